"""`model.save_pretrained(folder)` of a packed network of transformers, which writes it packed."""

from __future__ import annotations

import copy
import os
import weakref
from typing import Any

from torch import nn

from nmflow.errors import CompressError
from nmflow.packed.files.companions import saves_adapters
from nmflow.packed.files.saving import not_built, save

# What other calls pass along, and what it has to be: a packed network is one file, its own state.
_ONLY: dict[str, Any] = {
    "state_dict": None, "push_to_hub": False, "safe_serialization": True, "variant": None,
    "distributed_checkpoint": False,
}  # fmt: skip
_MEND = {"push_to_hub": ": call model.push_to_hub(repo_id)"}
_ANY = ("is_main_process", "max_shard_size", "save_function", "save_peft_format",
        "save_original_format", "token", "use_auth_token")  # fmt: skip


class SavePretrained:
    """Stands for the method `save_pretrained` of a packed network, without keeping it alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the packed network, its config and its generation config, as `nmflow.save` does.

        `from_pretrained` reads the folder again where nmflow is imported. `push_to_hub` of the
        network uploads what this writes. Where transformers holds adapters in the network, it
        writes those alone, as without nmflow.

        Raises:
            CompressError: as `save`; an option that asks for another kind of file; the config does
                not build all of the network, such as a layer that was added to it.
        """
        model = self._network()
        if saves_adapters(model):
            type(model).save_pretrained(model, save_directory, **options)  # pyright: ignore
            return
        if name := not_built(model):
            raise CompressError(
                f"model has '{name}', which its config does not build, so from_pretrained would "
                "leave it out: call nmflow.save(model, folder), and nmflow.load into a network of "
                "the same layers"
            )
        for name, value in options.items():
            if name in _ANY or (name in _ONLY and value == _ONLY[name]):
                continue
            said = value if isinstance(value, bool | int | str) else type(value).__name__
            mend = _MEND.get(name, ", which a packed network cannot be saved with: leave it out")
            raise CompressError(f"{name} is {said!r}{mend}")
        if options.get("is_main_process", True):
            save(model, save_directory)

    def _network(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise CompressError("model is gone: keep it, and call model.save_pretrained(folder)")
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(copy.deepcopy(self._network(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self._network(),)
