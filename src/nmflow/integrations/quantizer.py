"""The quantizer with which `from_pretrained` of transformers reads packed networks.

transformers builds the network on `meta` and reads what is stored plain; the packed weights come
from nmflow's own reader, which checks every tensor of the folder first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from nmflow.errors import CompressError, FileFormatError
from nmflow.packed import build
from nmflow.packed.compress import decompress
from nmflow.packed.files import container, place
from nmflow.packed.files.companions import METHOD, RIVALS
from nmflow.packed.files.fill import holder, packed_module
from nmflow.packed.files.stored import Stored
from nmflow.packed.fuse import fuse
from nmflow.packed.swap import replace_modules
from nmflow.packed.together import join

# What follows a packed weight's name in the names of its tensors, as in docs/layout.md.
_PARTS = r"(#\d+\.[a-z]+)?$"


class NMFlowConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed network: it says that nmflow reads it, and no more.

    What is packed, and how, is in `nmflow.json` beside the weights.
    """

    def __init__(self, **ignored: Any) -> None:
        self.quant_method: Any = METHOD


@dataclass(frozen=True)
class _Site:
    """A module whose weights are stored packed, and these by their names in it."""

    module: nn.Module
    weights: dict[str, Stored]
    dtype: torch.dtype

    def runs_dense(self) -> bool:
        """Whether the module stays dense: only the file holds it packed."""
        return all(weight.run != "packed" for weight in self.weights.values())


class NMFlowQuantizer(HfQuantizer):
    """Reads a folder that `nmflow.save` wrote into a network that transformers builds.

    Raises:
        FileFormatError: as `nmflow.load`.
        CompressError: the network is asked for on several devices, or to be packed while it is
            loaded.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._wanted: torch.dtype | None = None
        self._sites: list[_Site] = []
        self._read: tuple[Path, tuple[int, ...]] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what a packed network cannot do, before anything is read."""
        if not self.pre_quantized:
            raise CompressError(
                "quantization_config is nmflow's, but the folder holds a dense network: load it "
                "without, and pack it with nmflow.compress(model)"
            )
        where = kwargs.get("device_map")
        several = len({str(v) for v in where.values()}) > 1 if isinstance(where, Mapping) else (
            isinstance(where, str) and torch.cuda.device_count() > 1
        )  # fmt: skip
        if several or (isinstance(where, Mapping) and "disk" in where.values()):
            raise CompressError(
                f"device_map is {where!r}: a packed network lies on one device, such as 'cpu'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Read the folder, and take from the model the parameters that are stored packed."""
        folder = _folder(model, kwargs.get("checkpoint_files"))
        weights, tensors, _ = container.read(folder)
        del tensors  # checked, and read again by transformers
        file = container.file_of(folder)
        self._read = (file, container.version(file))
        _check_files(folder, file, kwargs.get("checkpoint_files"))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        modules = dict(model.named_modules())
        found: dict[str, dict[str, tuple[str, Stored]]] = {}
        placed: list[str] = []
        for saved, stored in weights.items():
            name = _name_in(model, saved, parameters)
            if name is None:
                continue  # transformers reports it, as any other weight that the model lacks
            placed.append(saved)
            _check_fit(name, stored, parameters[name])
            site, own = build.site_of(name, modules)
            if stored.run != "packed":
                site, _, own = name.rpartition(".")
            elif why := place.why_not(modules[site], own, stored):
                raise FileFormatError(f"{name} is packed in the file, but in the model: {why}")
            found.setdefault(site, {})[own] = (name, stored)
        for site, owns in found.items():
            for name, _ in owns.values():
                _hide(model, name)
            name, first = next(iter(owns.values()))
            dtype = self._dtype(model, name, first, kwargs)
            found_here = {own: weight for own, (_, weight) in owns.items()}
            self._sites.append(_Site(modules[site], found_here, dtype))
        # What transformers 5 leaves out of its report; 4 logs that the parts are not its own.
        short = [re.escape(saved.removeprefix(f"{model.base_model_prefix}.")) for saved in placed]
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {name + _PARTS for name in short}
        return model

    def _dtype(
        self, model: Any, name: str, stored: Stored, kwargs: Mapping[str, Any]
    ) -> torch.dtype:
        """The dtype that transformers gives to a weight that is stored plain."""
        wanted = self._wanted or stored.dtype
        if hasattr(model, "_get_dtype_plan"):
            plan: Mapping[str, torch.dtype] = model._get_dtype_plan(wanted)
        else:
            plan = dict.fromkeys(kwargs.get("keep_in_fp32_modules") or (), torch.float32)
        for part, dtype in plan.items():
            if re.search(part.replace("*", ".*"), name):
                return dtype
        return wanted

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Put the packed modules in, each in its turn."""
        if self._read is None or container.version(self._read[0]) != self._read[1]:
            raise FileFormatError("the saved network was replaced while it was read: load it again")
        device = next((t.device for t in model.parameters() if not t.is_meta), torch.device("cpu"))
        new: dict[nn.Module, nn.Module] = {}
        # Those that run dense come off the end first: a packed attention may hold one of them.
        self._sites.sort(key=_Site.runs_dense)
        while self._sites:
            site = self._sites.pop()
            _show(site)
            if site.runs_dense():
                for own, weight in site.weights.items():
                    dense = nn.Parameter(weight.dense().to(device, site.dtype))
                    site.module._parameters[own] = dense
                continue
            other = any(weight.dtype != site.dtype for weight in site.weights.values())
            made = packed_module(site.module, site.weights, _parameters(site.module))
            if made.training and not model.training:
                made.eval()
            new[site.module] = made.to(device, site.dtype) if other else made.to(device)
        replace_modules(model, new, inplace=True)
        fuse(model)
        join(model)
        # It runs, moves and saves as what `compress` returns does, so transformers may treat it so.
        del model.config.quantization_config
        model.is_quantized = False
        return model

    def update_dtype(self, dtype: Any) -> Any:
        """Take note of the dtype, which is not told again."""
        self._wanted = dtype
        return dtype

    update_torch_dtype = update_dtype  # its name in transformers 4

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes: `save_pretrained` of a packed network writes it packed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: packed weights are constants."""
        return False

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        made = decompress(model, inplace=True)
        return made if dtype is None else made.to(dtype)


def register() -> None:
    """Make the quantizer known to transformers, if it is not."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(NMFlowConfig)
        register_quantizer(METHOD)(NMFlowQuantizer)


def _folder(model: Any, files: Iterable[str] | None) -> Path:
    """The folder on this machine that holds the header; from a hub, it is fetched."""
    source = str(model.config.name_or_path)
    if files is not None:
        folder = Path(next(iter(files))).parent
        if os.path.isdir(source) or (folder / container.HEADER).exists():
            return folder
        # A cache of the hub: the commit is in the path of what was fetched already.
        found = re.search(r"snapshots[/\\]([0-9a-f]+)", str(folder))
        commit = found.group(1) if found else None
    elif os.path.isdir(source):
        return Path(source)
    else:
        commit = getattr(model.config, "_commit_hash", None)
    header = cached_file(source, container.HEADER, revision=commit)
    assert header is not None  # it raises
    return Path(header).parent


def _check_files(folder: Path, file: Path, files: Iterable[str] | None) -> None:
    """Refuse weights from elsewhere: those of another file, or of a name that comes first."""
    others = [f for f in files or () if os.path.realpath(f) != os.path.realpath(file)]
    others += [str(folder / name) for name in RIVALS if os.path.lexists(folder / name)]
    if others:
        raise FileFormatError(
            f"'{others[0]}' would be read in place of {file.name}, which holds the packed network: "
            "remove it, or save the network anew"
        )


def _name_in(model: Any, saved: str, parameters: Mapping[str, Tensor]) -> str | None:
    """The model's name of a saved weight; None if the model has no such weight.

    As in transformers, a network without a head reads one that has one, and the other way round.
    """
    prefix = f"{model.base_model_prefix}."
    for name in (saved, saved.removeprefix(prefix), prefix + saved):
        if name in parameters:
            return name
    return None


def _check_fit(name: str, stored: Stored, parameter: Tensor) -> None:
    if tuple(stored.shape) != tuple(parameter.shape):
        raise FileFormatError(
            f"{name} is {tuple(stored.shape)} in the file and {tuple(parameter.shape)} in the "
            "model: give the architecture that was saved"
        )
    if not place.alike(stored.dtype, parameter.dtype):
        raise FileFormatError(
            f"{name} is {stored.dtype} in the file, which the model cannot hold: give the "
            "architecture that was saved"
        )


def _hide(model: nn.Module, name: str) -> None:
    """Leave a tensor on `meta` where a parameter was, so that transformers expects none."""
    module, own = holder(model, name)
    was = module._parameters.pop(own)
    assert was is not None
    module.__dict__[own] = torch.empty_like(was, device="meta")


def _show(site: _Site) -> None:
    """Undo `_hide`: the module has its parameters again, on `meta`."""
    for own in site.weights:
        module, name = holder(site.module, own)
        hidden = module.__dict__.pop(name)
        module._parameters[name] = nn.Parameter(hidden, requires_grad=False)


def _parameters(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    return {
        (inner, own): value
        for inner in module.modules()
        for own, value in inner._parameters.items()
        if value is not None
    }


register()  # also where this module is imported before transformers has its lists
