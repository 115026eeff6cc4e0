"""Find one file on the Hugging Face Hub. Every failure is one line.

Cache, login and endpoint are huggingface_hub's own (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX
from laai_core.hub.path import HubPath
from laai_core.hub.path import hub_path as parsed

_SECONDS = 10.0  # timeout of the request for a repository's file names


def local_file(source: str | Path, local_files_only: bool = False) -> Path:
    """The file on this machine that `source` names, downloaded into huggingface_hub's cache if it is not there yet.

    Args:
        source: a path, or a name as `laai_core.hub.path.hub_path` reads it. Without a file the repository must hold
            exactly one .safetensors.
        local_files_only: use the cache only, no network.

    Raises:
        LaaiError: no such repository, revision or file, none or several to choose from, gated, no network.
    """
    if not isinstance(source, str | os.PathLike) or not str(source).strip():
        raise LaaiError(f"{source!r:.60} is no intervention: expected a file, or a name on the Hugging Face Hub")
    hub_path = parsed(source)
    if hub_path is None:
        return Path(os.path.expanduser(source))
    file = hub_path.file or _only(_files(hub_path, local_files_only), hub_path)
    with explained(HubPath(hub_path.repo, file, hub_path.revision), local_files_only):
        path = hf_hub_download(
            hub_path.repo,
            file,
            revision=hub_path.revision,
            local_files_only=local_files_only,
            library_name="lm-eval-laai",
        )
    return Path(path)


def _files(hub_path: HubPath, local_files_only: bool) -> list[str]:
    """Names of the repository's interventions; those in the cache when the Hub cannot be reached."""
    with explained(hub_path, local_files_only):
        reason: Exception | None = None
        if not local_files_only:
            try:
                # Not list_repo_files: that one retries for half a minute when there is no network.
                info = HfApi(library_name="lm-eval-laai").model_info(
                    hub_path.repo, revision=hub_path.revision, timeout=_SECONDS
                )
                return _interventions(sibling.rfilename for sibling in info.siblings or ())
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
                reason = error
            except (HTTPError, OSError) as error:
                reason = error
        try:
            folder = Path(snapshot_download(hub_path.repo, revision=hub_path.revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise error from reason
    return _interventions(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _interventions(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(SUFFIX))


def _only(names: list[str], hub_path: HubPath) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise LaaiError(f"{hub_path} holds no {SUFFIX} file")
    raise LaaiError(f"{hub_path} holds {', '.join(names)}: name one, as in {hub_path.repo}:{names[0]}")


@contextmanager
def explained(hub_path: HubPath, local_files_only: bool) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each. The order matters: some derive from others."""
    try:
        yield
    except GatedRepoError:
        raise LaaiError(f"{hub_path.repo} is gated: ask for access on its page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise LaaiError(
            f"{hub_path.repo} is neither a local file nor a repository on {constants.ENDPOINT}; "
            f"if it is private: `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise LaaiError(f"{hub_path.repo} has no revision {hub_path.revision!r}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise LaaiError(f"{hub_path} is not in the cache, and the Hub is switched off (offline mode)") from None
        raise LaaiError(f"{_unreachable(error)}, and {hub_path} is not in the cache") from None
    except EntryNotFoundError:
        others = ", ".join(_files(hub_path, local_files_only)) or "none"
        raise LaaiError(f"{hub_path.repo} has no file {hub_path.file!r}; its {SUFFIX} files: {others}") from None
    except HFValidationError as error:
        raise LaaiError(f"{hub_path.repo} is no repository name: {_one_line(error)}") from None
    except HfHubHTTPError as error:
        raise LaaiError(f"the Hub refused {hub_path} ({error.response.status_code}): {_one_line(error)}") from None
    except (HTTPError, OSError) as error:
        raise LaaiError(_unreachable(error)) from None
    except ValueError as error:  # how huggingface_hub reports a model card that the Hub does not accept
        raise LaaiError(f"the Hub refused {hub_path}: {_one_line(error)}") from None


def _unreachable(error: Exception) -> str:
    return f"cannot reach the Hub at {constants.ENDPOINT} ({_one_line(error.__cause__ or error)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
