"""Checkpoints that hold all of a network: a witness of what was saved, and a save by its own names.

A trainer may save a network under other names than it loads, and then goes on from whatever the
parameters held when they were made. Nothing here needs a package beside torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from nmflow.errors import StateError
from nmflow.flow.sharding import local
from nmflow.text_table import one_line

WITNESS = "nmflow_witness"
"""The key of a checkpoint's witness in whatever state of the trainer travels with it."""

FILE = "model.safetensors"
_OWN = ("nmflow_names", "own")


def sums(model: nn.Module) -> dict[str, str]:
    """A checksum of each parameter and each persistent buffer: `{"fc.weight": "float32 1a2b3c4d"}`.

    Of a sharded parameter, this rank's part. What has no bytes here is left out: empty parts,
    `meta` tensors, and tensor classes that keep their values elsewhere.
    """
    tensors = dict(model.named_parameters())
    for path, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.removeprefix(f"{path}.") not in hidden:
                tensors[name] = buffer  # type: ignore[assignment]
    found = {}
    for name, tensor in tensors.items():
        part = local(tensor.data)
        if type(part) is Tensor and part.numel() and not part.is_meta and not part.is_sparse:
            data = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            crc = zlib.crc32(memoryview(data))  # pyright: ignore[reportArgumentType]
            found[name] = f"{str(part.dtype).removeprefix('torch.')} {crc:08x}"
    return found


def check(saved: Mapping[str, str], model: nn.Module, without: Collection[str] = ()) -> None:
    """Raise a `StateError` unless a network holds what `sums` saw when it was saved.

    Tensors whose dtype has changed since are not compared, nor those that are left out by name.
    """
    now = sums(model)
    lost = [name for name, value in saved.items() if not _same(value, now.get(name))]
    lost = [*lost, *(name for name in now if name not in saved)]
    lost = [name for name in lost if name not in without]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise StateError(
            f"the checkpoint was loaded in part: {len(lost)} of the network's "
            f"{len(now.keys() | saved.keys())} tensors are not what was saved "
            f"({', '.join(lost[:3])}{more}), so the network is not the one that was trained: save "
            "with nmflow.integrations.transformers.ExactCheckpoints before the Trainer in your "
            "class, or start anew"
        )


def check_saved(folder: Path, model: nn.Module) -> None:
    """Raise a `StateError` unless a network holds what a `Trainer` saved in a checkpoint's folder.

    A checkpoint without a witness says nothing.
    """
    with contextlib.suppress(FileNotFoundError):
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        witness = state.get("stateful_callbacks", {}).get(WITNESS)
        if witness:
            check(witness["sums"], model)


def _same(saved: str, now: str | None) -> bool:
    return now is not None and (saved == now or saved.split()[0] != now.split()[0])


class Witness:
    """Notes what a `Trainer` saves, and checks it where training goes on; a part of a callback.

    Checksums go into `state.stateful_callbacks`, which each checkpoint holds. They are taken where
    the `Trainer` is about to save; where that was decided later, the state is written once more.
    """

    def witness_resume(self, state: Any, model: nn.Module, without: Collection[str] = ()) -> None:
        """Compare, when training begins at a step that is not the first.

        Args:
            state: the trainer's.
            model: the network.
            without: the names of what an optimizer's state gave since.
        """
        saved = state.stateful_callbacks.get(WITNESS) or {}
        if state.global_step and state.is_world_process_zero:
            if saved.get("step") == state.global_step:
                check(saved["sums"], model, without)
            state.stateful_callbacks.pop(WITNESS, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note, before a save of this step."""
        if control.should_save:
            _note(state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note, before a save of this epoch."""
        if control.should_save:
            _note(state, kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state once more, where the save was not foreseen."""
        seen = (state.stateful_callbacks.get(WITNESS) or {}).get("step")
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "trainer_state.json"
        if state.is_world_process_zero and seen != state.global_step and file.is_file():
            _note(state, kwargs["model"])
            whole = file.with_suffix(".json.part")
            state.save_to_json(str(whole))
            os.replace(whole, file)


def _note(state: Any, model: nn.Module) -> None:
    if state.is_world_process_zero:
        state.stateful_callbacks[WITNESS] = {"step": state.global_step, "sums": sums(model)}


class ExactCheckpoints:
    """A mixin whose checkpoints hold a network by its own names, and are loaded whole or refused.

    `Trainer` saves what `save_pretrained` writes, under the names that a published network has.
    Where they differ from those of the module, its own load takes less than everything: of a ViT
    under transformers 5.24, eight tensors of forty. `save_model` writes what it always does.
    Sharded networks and adapters are left to the `Trainer`.

    Example:
        >>> from transformers import Trainer
        >>> from nmflow.integrations.transformers import ExactCheckpoints, FinalMasksEvaluation
        >>> class SparseTrainer(ExactCheckpoints, FinalMasksEvaluation, Trainer):
        ...     pass
    """

    args: Any
    model: Any
    processing_class: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What `Trainer.save_model` does, and in a checkpoint the network by its own names."""
        if not _internal_call or output_dir is None or not self._whole():
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif self.args.should_save:
            place = Path(output_dir)
            place.mkdir(parents=True, exist_ok=True)
            save(self.model, place / FILE)
            for part in (getattr(self.model, "config", None), self.processing_class):
                if part is not None and hasattr(part, "save_pretrained"):
                    part.save_pretrained(place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint)
        if is_own(place / FILE):
            load(self.model if model is None else model, place / FILE)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _whole(self) -> bool:
        """Whether this process has all of the network, and saves all of it."""
        sharded = ("is_fsdp_enabled", "is_deepspeed_enabled")
        if any(getattr(self, name, False) for name in sharded) or hasattr(
            self.model, "peft_config"
        ):
            return False
        return all(type(p.data) is Tensor for p in self.model.parameters())


def save(model: nn.Module, file: Path) -> None:
    """Write all parameters and persistent buffers by the module's own names; shared ones once."""
    save_model(model, str(file), metadata=dict([_OWN, ("format", "pt")]))


def is_own(file: Path) -> bool:
    """Whether `save` wrote a file."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get(_OWN[0]) == _OWN[1]


def load(model: nn.Module, file: Path) -> None:
    """Load what `save` wrote.

    Raises:
        StateError: a name or a shape that the file or the network lacks.
    """
    try:
        missing, unexpected = load_model(model, file, strict=False)
    except RuntimeError as error:
        raise StateError(
            f"{str(file)!r} is of another network ({one_line(error, 300)}): start anew, or build "
            "the network that was saved"
        ) from None
    if missing or unexpected:
        said = [
            f"{', '.join(sorted(names)[:3])} of {len(names)} {which}"
            for names, which in ((missing, "not in the file"), (unexpected, "not in the network"))
            if names
        ]
        raise StateError(
            f"{str(file)!r} is of another network ({'; '.join(said)}): start anew, or build the "
            "network that was saved"
        )
