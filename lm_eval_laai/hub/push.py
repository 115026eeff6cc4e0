"""Put an intervention on the Hugging Face Hub, with its model card, in one commit."""

from __future__ import annotations

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX
from laai_core.hub import HubPath, explained
from laai_core.intervention import Intervention
from lm_eval_laai.hub.card import Scores, model_card, task_of


def push_to_hub(
    intervention: Intervention,
    repo: str,
    file: str | None = None,
    scores: Scores | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """Upload the file and a model card (README.md, replaced if there is one) in one commit.

    Args:
        repo: `org/name`, made if it is new.
        file: name in the repository. Default: the task's name.
        scores: {task: {metric: value}} for the card, such as `results` of the harness's results file.
        private: for a new repository; None is the account's default.
        revision: the branch to commit to.
        license: of the intervention, for the card, as the Hub calls it, such as apache-2.0.

    Returns:
        The commit's address.

    Raises:
        LaaiError: a bad name, not logged in, no right to write, no such branch, no network.
    """
    if "/" not in repo:  # the Hub would make a repository of the user's, and take no commit to this name
        raise LaaiError(f"{repo!r:.60} is no repository name: expected ORG/NAME")
    file = file or f"{task_of(intervention) or 'intervention'}{SUFFIX}"
    if not file.endswith(SUFFIX):
        raise LaaiError(f"file is {file!r}: expected a name that ends in {SUFFIX}")
    files = {
        file: intervention.to_bytes(),
        "README.md": model_card(intervention, repo, file, scores, license).encode(),
    }
    api = HfApi(library_name="lm-eval-laai")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    message = f"Upload {file}"
    with explained(HubPath(repo, revision=revision), local_files_only=False):
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise LaaiError(f"the Hub does not let you write to {repo}: log in with a write token") from None
            raise
