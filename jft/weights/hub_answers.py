"""What huggingface_hub says and raises, in the words of jft; works with its 1.x and 2.x."""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from jft.errors import WeightsError, nearest

TIMEOUT_SECONDS = 10.0
_QUERY = re.compile(r"\?\S*")  # of signed addresses: it holds a key
_BUSY = (408, 429, 500, 502, 503, 504)


class UnreachableError(WeightsError):
    """The hub does not answer; by choice where HF_HUB_OFFLINE says that it is not asked."""

    by_choice = False


def library() -> Any:
    """huggingface_hub with the parts of it that are used here.

    Raises:
      WeightsError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise WeightsError("hf: sources need huggingface_hub: pip install 'jft[hub]'") from error
    return huggingface_hub


def look_up(source: str, repo: str, revision: str) -> tuple[str, list[str]]:
    """(commit of a revision, names of its files), as the hub says now.

    Raises:
      WeightsError: there is no such repository or revision, or the hub cannot be reached.
    """
    with explained(source, repo, f"revision {revision!r}", revision):
        api = library().HfApi(library_name="jft")
        found = api.model_info(repo, revision=revision, timeout=TIMEOUT_SECONDS)
        return str(found.sha), [entry.rfilename for entry in found.siblings or ()]


@contextlib.contextmanager
def explained(source: str, repo: str, what: str, revision: str = "main") -> Iterator[None]:
    """Turns what huggingface_hub raises into one line.

    Args:
      source: as written.
      repo: "owner/name".
      what: is asked for: a file, or a revision.
      revision: that may not exist.

    Raises:
      UnreachableError: the hub does not answer.
      WeightsError: it says no.
    """
    hub = library()
    errors, constants = hub.errors, hub.constants
    here, login = f"source {source!r}", "log in with `hf auth login`, or set HF_TOKEN"
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except WeightsError:
        raise
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{here}: {repo} asks for consent: accept its terms at {page}, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{here}: {constants.ENDPOINT} has no repository {repo!r}, or it is private: {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        near = _near_revision(repo, revision)
        raise WeightsError(f"{here}: {repo} has no revision {revision!r}{near}") from error
    except Exception as error:
        if is_silence(error):
            raise _unreachable(here, what, error) from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise WeightsError(
                f"{here}: the disk of the cache {constants.HF_HUB_CACHE} is full;"
                " HF_HOME names another place"
            ) from error
        if isinstance(error, (OSError, errors.HFValidationError)):
            raise WeightsError(f"{here}: {what}: {brief(error)}") from error
        raise


def _unreachable(here: str, what: str, error: Exception) -> UnreachableError:
    hub = library()
    cache = hub.constants.HF_HUB_CACHE
    offline = bool(hub.constants.HF_HUB_OFFLINE)
    why = f"{hub.constants.ENDPOINT} cannot be reached ({brief(error)})"
    if offline:
        why = "HF_HUB_OFFLINE is set"
    found = UnreachableError(f"{here}: {why}, and the cache {cache} does not hold {what}")
    found.by_choice = offline
    return found


def _near_revision(repo: str, revision: str) -> str:
    try:
        refs = library().HfApi(library_name="jft").list_repo_refs(repo)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    except Exception:  # only a hint, after another error
        return ""
    return nearest(revision, names) or f"; it has {', '.join(names[:5])}"


def is_silence(error: Exception) -> bool:
    """Whether the hub did not answer, rather than answered with a no."""
    errors = library().errors
    if isinstance(error, errors.HfHubHTTPError):
        return getattr(getattr(error, "response", None), "status_code", None) in _BUSY
    kinds = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError)
    return isinstance(error, (*kinds, ConnectionError, TimeoutError))


def brief(error: Exception) -> str:
    """The first line of an error, without the keys in the addresses that it names."""
    lines = [line.strip() for line in _QUERY.sub("", str(error)).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text[:160]
