"""A plan by itself as a folder that travels; see `freqopt.plan.folder`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from freqopt.errors import PlanError
from freqopt.plan.content import PlanContent
from freqopt.plan.folder import ALONE, fetched, pushed, read_folder, write_folder

if TYPE_CHECKING:
    from typing_extensions import Self


class Travelling(PlanContent):
    """A plan that is saved as a folder, and read from one."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Read a plan's file; what a plan is says how."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan into a folder, beside a README.md with its figures.

        The file is named after `component`, or "model".

        Raises:
            InputError: the component's name cannot be a file's.
        """
        write_folder({self.component or ALONE: self}, folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        component: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Read a plan from a folder of plans, or from a repository of the Hugging Face Hub.

        Args:
            source: a folder, or "owner/name".
            component: which one, where the folder has several.
            revision: branch, tag or commit of a repository.

        Raises:
            PlanError: there is none, there are several, it is damaged, or another component's.
        """
        found: dict[str, Self] = read_folder(fetched(source, revision), cls.load)
        if component is None and len(found) == 1:
            return next(iter(found.values()))
        if component is None or component not in found:
            raise PlanError(
                f"{source} has plans for {', '.join(found)}: pass component= one of these, or "
                "read them all with freqopt.Plans.from_pretrained"
            )
        return found[component]

    def push_to_hub(
        self, repository: str, *, private: bool = False, message: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes as a repository "owner/name" of the Hub.

        Returns:
            The address of the commit.

        Raises:
            PlanError: huggingface_hub is not installed.
        """
        name = self.component or ALONE
        return pushed({name: self}, repository, private=private, message=message)
