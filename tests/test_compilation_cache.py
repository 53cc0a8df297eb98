"""The cache of compiled steps: named to jax before it starts, and never against the user's word."""

import stat

from jft.compilation_cache import cache_folder, use_compilation_cache


def test_the_folder_is_made_for_the_user_alone_and_named_to_jax(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    use_compilation_cache(environment)
    folder = cache_folder(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.is_relative_to(tmp_path) and folder.name.startswith("compiled-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_users_own_folder_stays(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    use_compilation_cache(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_switches_nothing_on(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    use_compilation_cache(environment)
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
