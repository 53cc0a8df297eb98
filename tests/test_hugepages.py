"""The process asks for huge pages once, and never against its user's wish."""

import subprocess
import sys

import pytest

from jft.hugepages import TUNABLE, with_huge_pages


def test_a_kernel_that_gives_huge_pages_on_request_is_asked():
    assert with_huge_pages({"A": "b"}, "madvise") == {"A": "b", "GLIBC_TUNABLES": f"{TUNABLE}=1"}
    others = {"GLIBC_TUNABLES": "glibc.malloc.check=1"}
    asked = with_huge_pages(others, "madvise")
    assert asked == {"GLIBC_TUNABLES": f"glibc.malloc.check=1:{TUNABLE}=1"}
    assert with_huge_pages(asked, "madvise") is None


def test_nothing_is_asked_where_it_is_decided_or_of_no_use():
    assert with_huge_pages({"GLIBC_TUNABLES": f"{TUNABLE}=0"}, "madvise") is None
    for kernel in ("always", "never", ""):
        assert with_huge_pages({}, kernel) is None


def test_the_process_starts_again_once_with_its_arguments_and_flags():
    program = """
import os, sys
from jft import hugepages
hugepages.mode = lambda: "madvise"
hugepages.use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.dont_write_bytecode, os.getpid())
"""
    command = [sys.executable, "-B", "-c", program, "train", "--config=a b"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={})
    output, _ = process.communicate(timeout=60)
    assert output == f"{TUNABLE}=1 ['train', '--config=a b'] 1 {process.pid}\n"


PROGRAM = """
import os, sys
from jft import __main__, hugepages
hugepages.mode = lambda: "madvise"
{before}
try:
    __main__.run()
finally:
    print(len([o for o in sys.orig_argv if o == "jft_huge_pages"]))
"""


@pytest.mark.parametrize(
    ("before", "starts"),
    [
        ("sys.argv[0] = __main__.__file__", 1),
        # Something takes the variable away again: it is not asked for a second time.
        ("sys.argv[0] = '/venv/bin/jft'; os.environ.pop('GLIBC_TUNABLES', None)", 1),
        ("", 0),
        ("sys.argv[0] = 'jft'; sys.settrace(lambda *_: None)", 0),
    ],
)
def test_only_a_process_of_its_own_starts_again_and_only_once(before, starts):
    command = [sys.executable, "-c", PROGRAM.format(before=before), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, timeout=60)
    assert done.stdout.splitlines()[-1] == str(starts), done.stderr
