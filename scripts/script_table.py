"""Tries the lines of docs/howto/scripts.md in scripts of others: whole, and stopped and resumed.

    python scripts/script_table.py [--control] FOLDER [NAME …]

What a script needs beside what nmflow does is looked for in $SCRIPT_PATH, if it is not installed.
FOLDER holds clones of the repositories below, under their names; nothing in them is written. Each
script runs with our lines in a folder of its own on tiny data that are made here, whole and stopped
in mid-training, and what it saves last is compared bit by bit. `--control` runs it as it is, too.

Where a script begins its random numbers anew on a resume, its data are such that their order and
crops make no difference: one example, again and again.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import nmflow

Edit = tuple[str, str]

# Read by every process that a script starts: ends it before a step, as a kill would, and lets a
# torchvision without operators be imported.
SITE = """
import os
import torch
if os.environ.get("STOP_BEFORE"):
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    left = [int(os.environ["STOP_BEFORE"])]
    def stop(*_):
        left[0] -= 1
        if not left[0]:
            os._exit(9)
    register_optimizer_step_pre_hook(stop)
try:
    torch.ops.torchvision.nms
except AttributeError:
    made_up = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        made_up.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# As above, for a script that asks for two accelerators: CPUs, and batches by the step. It leaves
# weights as it finds their memory.
TWO_CPUS = """
import contextlib
torch.accelerator.is_available = lambda: True
torch.accelerator.device_count = lambda: 2
current = lambda check_available=False: None if check_available else "cpu"
torch.accelerator.current_accelerator = current
torch.accelerator.device_index = lambda *_: contextlib.nullcontext()
begin = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, device_id: begin("gloo")
drawn = [int(os.environ.get("BATCHES_BEFORE", 0))]
randint = torch.randint
def by_step(*args, **kwargs):
    if "generator" in kwargs:
        return randint(*args, **kwargs)
    drawn[0] += 1
    return randint(*args, **kwargs, generator=torch.Generator().manual_seed(drawn[0]))
torch.randint = by_step
empty = torch.nn.Module.to_empty
def filled(self, **how):
    empty(self, **how)
    for p in self.parameters():
        p.detach().to_local().normal_(std=0.02, generator=torch.Generator().manual_seed(1))
torch.nn.Module.to_empty = filled
"""


@dataclass
class Script:
    """One script of others, and how to try it.

    Attributes:
        file: the script in its repository.
        edits: what is there, and what it becomes; each is found once.
        command: the script's arguments.
        data: makes the data in a folder.
        state: what it saves last.
        stop: the step before which it is ended, for a resume.
        resume: arguments that make it go on; None where it cannot.
        beside: other files of the repository that it needs.
        always: edits that the machine asks for, without us too.
    """

    file: str
    edits: list[Edit]
    command: str
    data: Callable[[Path], None]
    state: str
    pattern: str = "1:16"
    stop: int = 0
    resume: list[str] | None = None
    beside: list[str] = field(default_factory=list)
    always: list[Edit] = field(default_factory=list)
    whole: list[Edit] = field(default_factory=list)
    site: str = SITE
    launch: list[str] = field(default_factory=lambda: [sys.executable])


# -- data ---------------------------------------------------------------------------------------


def tokens(place: Path) -> None:
    """A text of one batch."""
    folder = place / "data" / "tiny"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(17, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 64}))


def words(place: Path) -> None:
    """Three texts of a few words."""
    rng = np.random.default_rng(0)
    (place / "data").mkdir()
    for split in ("train", "valid", "test"):
        said = [" ".join(f"w{i}" for i in rng.integers(0, 40, 8)) for _ in range(40)]
        (place / "data" / f"{split}.txt").write_text("\n".join(said), encoding="utf-8")


def images(place: Path) -> None:
    """Images of one colour, of one class, as `ImageFolder` reads them."""
    for split in ("train", "val", "validation"):
        folder = place / "data" / split / "a"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), (90, 140, 30)).save(folder / f"{i}.png")


def bert(place: Path, name: str) -> None:
    """A BERT of two layers, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **special).save_pretrained(
        place / name
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(place / name)


_WORDS = [f"w{i}" for i in range(40)]


def _sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, 6)) for _ in range(count)]


def _json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mrpc(place: Path) -> None:
    """Pairs of sentences under the name that a script asks the hub for, and a metric."""
    bert(place, "bert-base-cased")
    for split in ("train", "validation"):
        said = _sentences(128)
        rows = [
            {"sentence1": a, "sentence2": b, "label": i % 2, "idx": i}
            for i, (a, b) in enumerate(zip(said[::2], said[1::2], strict=True))
        ]
        _json_lines(place / "nyu-mll" / "glue" / "mrpc" / f"{split}.jsonl", rows)
    (place / "nyu-mll" / "glue" / "README.md").write_text(
        "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
        "  - {split: train, path: mrpc/train.jsonl}\n"
        "  - {split: validation, path: mrpc/validation.jsonl}\n---\n"
    )
    (place / "glue").mkdir()
    (place / "glue" / "glue.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Glue(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = {k: datasets.Value('int64') for k in ('predictions', 'references')}\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "                                   features=datasets.Features(features))\n"
        "    def _compute(self, predictions, references):\n"
        "        right = sum(p == r for p, r in zip(predictions, references))\n"
        "        return {'accuracy': right / len(references), 'f1': 0.0}\n"
    )


def stsb(place: Path) -> None:
    """Pairs of sentences with scores, and a model without a head."""
    bert(place, "tiny-bert")
    for split in ("train", "validation", "test"):
        said = _sentences(1280 if split == "train" else 32)
        rows = [
            {"sentence1": a, "sentence2": b, "score": (i % 5) / 4}
            for i, (a, b) in enumerate(zip(said[::2], said[1::2], strict=True))
        ]
        _json_lines(place / "sentence-transformers" / "stsb" / f"{split}.jsonl", rows)


def chats(place: Path) -> None:
    """A text column, and a Llama of two layers with a tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    bert(place, "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    tokenizer.eos_token = "[SEP]"
    shutil.rmtree(place / "tiny-llama")
    tokenizer.save_pretrained(place / "tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "tiny-llama")
    _json_lines(place / "texts" / "train.jsonl", [{"text": said} for said in _sentences(64)])


def nothing(place: Path) -> None:
    """No data: the script draws its own."""


# -- scripts ------------------------------------------------------------------------------------

IMPORT = "import nmflow\n"


def before(text: str, added: str) -> Edit:
    """Lines before a line that stays."""
    return text, added + text


def after(text: str, added: str) -> Edit:
    """Lines after a line that stays."""
    return text, text + added


SCRIPTS: dict[str, Script] = {
    "nanoGPT": Script(
        "nanoGPT/train.py",
        [
            before("import numpy as np\n", IMPORT),
            after(
                "raw_model = model.module if ddp else model # unwrap DDP container if needed\n",
                'flow = nmflow.attach(raw_model, optimizer, "settling", "1:16", '
                "total_steps=max_iters)\nestimate_loss = flow.final_masks()(estimate_loss)\n",
            ),
        ],
        "--dataset=tiny --device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 "
        "--block_size=16 --batch_size=4 --max_iters=12 --lr_decay_iters=12 --warmup_iters=0 "
        "--eval_interval=4 --eval_iters=1 --gradient_accumulation_steps=2 --dtype=float32",
        tokens,
        "out/ckpt.pt",
        stop=7,
        resume=["--init_from=resume"],
        beside=["nanoGPT/model.py", "nanoGPT/configurator.py"],
    ),
    "pytorch/examples word_language_model": Script(
        "examples/word_language_model/main.py",
        [
            before("import data\n", IMPORT),
            after(
                "    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)\n",
                '    flow = nmflow.attach(model, optimizer, "settling", "1:16", '
                "total_steps=args.epochs * -(-(len(train_data) - 1) // args.bptt))\n",
            ),
            before("# Run on test data.\n", "flow.finalize_copy(model)\n"),
        ],
        "--data data --use-optimizer --emsize 32 --nhid 32 --nlayers 1 --lr 0.01 --epochs 3 "
        "--batch_size 4 --bptt 8 --dropout 0",
        words,
        "model.pt",
        beside=[f"examples/word_language_model/{name}.py" for name in ("data", "model")],
    ),
    "pytorch/examples imagenet": Script(
        "examples/imagenet/main.py",
        [
            before("import torch\n", IMPORT),
            after(
                "        num_workers=args.workers, pin_memory=True, sampler=val_sampler)\n",
                '    flow = nmflow.attach(model, optimizer, "settling", "1:16", '
                "total_steps=args.epochs * len(train_loader))\n",
            ),
            (
                "        acc1 = validate(val_loader, model, criterion, args)\n",
                "        acc1 = flow.final_masks()(validate)(val_loader, model, criterion, args)\n",
            ),
        ],
        "data --seed 0 --no-accel -a resnet18 --epochs 4 -b 4 -j 0 --lr 0.01",
        images,
        "checkpoint.pth.tar",
        stop=3,
        resume=["--resume", "checkpoint.pth.tar"],
    ),
    "pytorch/examples FSDP2": Script(
        "examples/distributed/FSDP2/example.py",
        [
            before("import torch\n", IMPORT),
            after(
                "    optim = torch.optim.Adam(model.parameters(), lr=1e-2)\n",
                '    nmflow.attach(model, optim, "settling", "1:16", total_steps=20)\n',
            ),
        ],
        "",
        nothing,
        "checkpoints/*_api/*/model_state_dict.pt",
        stop=-10,
        resume=[],
        beside=[f"examples/distributed/FSDP2/{n}.py" for n in ("checkpoint", "model", "utils")],
        whole=[("for _ in range(10):", "for _ in range(20):")],
        site=SITE + TWO_CPUS,
        launch=["torchrun", "--nproc-per-node", "2"],
    ),
    "timm": Script(
        "pytorch-image-models/train.py",
        [
            before("import torchvision.utils\n", IMPORT),
            after(
                "    results = []\n",
                '    flow = nmflow.attach(model, optimizer, "settling", "1:16", '
                "total_steps=num_epochs * updates_per_epoch)\n"
                "    validate = flow.final_masks()(flow.final_masks("
                'task.get_trainable_module(ema=True))(globals()["validate"]))\n',
            ),
        ],
        "--data-dir data --model test_vit --num-classes 2 --model-ema --model-ema-decay 0.9 "
        "--epochs 4 --warmup-epochs 0 --cooldown-epochs 0 --batch-size 2 --workers 0 "
        "--opt adamw --lr 1e-3 --no-aug --device cpu --output out --experiment run",
        images,
        "out/run/last.pth.tar",
        stop=5,
        resume=["--resume", "out/run/last.pth.tar"],
    ),
    "accelerate": Script(
        "accelerate/examples/complete_nlp_example.py",
        [
            before("import torch\n", IMPORT),
            after(
                "train_dataloader, eval_dataloader, lr_scheduler\n    )\n",
                '    flow = nmflow.attach(model, optimizer, "settling", "1:16", '
                "total_steps=num_epochs * len(train_dataloader))\n",
            ),
            (
                "            with torch.no_grad():\n",
                "            with torch.no_grad(), flow.final_masks():\n",
            ),
        ],
        "--cpu --checkpointing_steps epoch",
        mrpc,
        "epoch_2/*",
        stop=6,
        resume=["--resume_from_checkpoint", "epoch_0"],
    ),
    "Lightning": Script(
        "pytorch-lightning/examples/pytorch/domain_templates/imagenet.py",
        [
            before(
                "from lightning.pytorch import LightningModule\n",
                "from nmflow.integrations.lightning import NMFlowCallback\n",
            ),
            before(
                "                # save when the validation top1 accuracy improves\n",
                '                NMFlowCallback("settling", "1:16"),\n',
            ),
        ],
        "fit --model.data_path data --model.batch_size 4 --model.workers 0 --model.lr 0.01 "
        "--trainer.max_epochs 4 --trainer.accelerator cpu --trainer.default_root_dir out "
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint "
        "--trainer.callbacks.dirpath=ends --trainer.callbacks.save_top_k=-1",
        images,
        "ends/*.ckpt",
        stop=3,
        resume=["--ckpt_path", "ends/epoch=1-step=2.ckpt"],
    ),
    "sentence-transformers": Script(
        "sentence-transformers/examples/sentence_transformer/training/sts/training_stsbenchmark.py",
        [
            before(
                "from sentence_transformers import SentenceTransformer\n",
                "from nmflow.integrations.transformers import NMFlowCallback\n",
            ),
            before(
                "    evaluator=dev_evaluator,\n",
                '    callbacks=[NMFlowCallback("settling", "1:16")],\n',
            ),
        ],
        "tiny-bert",
        stsb,
        "output/*/final/model.safetensors",
        always=[("    fp16=True,", "    fp16=False,")],
    ),
    "TRL": Script(
        "trl/trl/scripts/sft.py",
        [
            before(
                "import argparse\n", "from nmflow.integrations.transformers import NMFlowCallback\n"
            ),
            before(
                "        peft_config=get_peft_config(model_args),\n",
                '        callbacks=[NMFlowCallback("settling", "1:16")],\n',
            ),
        ],
        "--model_name_or_path tiny-llama --dataset_name texts --output_dir out --max_steps 8 "
        "--save_steps 4 --use_cpu True --bf16 False --report_to none --logging_steps 2 "
        "--gradient_checkpointing False --per_device_train_batch_size 4",
        chats,
        "out/model.safetensors",
        stop=7,
        resume=["--resume_from_checkpoint", "out/checkpoint-4"],
    ),
}


# -- trying them --------------------------------------------------------------------------------


def edited(text: str, edits: list[Edit]) -> str:
    """A script with some edits; each place is found once."""
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times: {old!r}"
        text = text.replace(old, new)
    return text


def lines(script: Script, text: str) -> int:
    """How many lines are added or changed."""
    both = difflib.ndiff(text.splitlines(), edited(text, script.edits).splitlines())
    return sum(line.startswith("+ ") for line in both)


def run(script: Script, clones: Path, ours: bool, stopped: bool) -> dict[str, torch.Tensor]:
    """Train, and give every tensor of what is saved last."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        script.data(place)
        (place / "sitecustomize.py").write_text(script.site)
        for file in script.beside:
            shutil.copy(clones / file, place)
        text = edited((clones / script.file).read_text(encoding="utf-8"), script.always)
        text = edited(text, script.edits) if ours else text
        name = Path(script.file).name
        (place / name).write_text(text if stopped else edited(text, script.whole), "utf-8")
        command = [*script.launch, name, *script.command.split()]
        if stopped:
            stop = script.stop
            first = {"STOP_BEFORE": str(stop)} if stop > 0 else {}
            ended = _call(command, place, first)
            assert (ended.returncode == 9) == (stop > 0), ended.stderr[-3000:]
            command += script.resume or []
            ended = _call(command, place, {"BATCHES_BEFORE": str(max(0, -stop))})
        else:
            ended = _call(command, place, {})
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        if os.environ.get("VERBOSE"):
            print(ended.stdout[-1500:], ended.stderr[-1500:])
        files = sorted(place.glob(script.state), key=lambda f: f.stat().st_mtime_ns)
        assert files, f"nothing under {script.state}"
        return _tensors(files if script.state.endswith("*") else files[-1:], place)


def _call(command: list[str], place: Path, more: dict[str, str]) -> Any:
    path = os.pathsep.join(
        [str(place), *map(os.environ.get, ("PYTHONPATH", "SCRIPT_PATH"), ("",) * 2)]
    )
    known = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HOME": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    known |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "WANDB_MODE": "disabled", **more}
    return subprocess.run(
        command, cwd=place, env=known, capture_output=True, text=True, check=False
    )


def _tensors(files: list[Path], place: Path) -> dict[str, torch.Tensor]:
    sys.path.insert(0, str(place))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            saved: Any = load_file(file)
        elif file.suffix in (".pt", ".tar", ".ckpt", ".bin"):
            saved = torch.load(file, weights_only=False, map_location="cpu")
        else:
            continue
        saved = saved.state_dict() if isinstance(saved, torch.nn.Module) else saved
        saved.pop("callbacks", None)  # Lightning's, with paths of files
        _flatten(saved, file.name, found)
    sys.path.remove(str(place))
    for module in ("model", "data"):
        sys.modules.pop(module, None)
    return found


def _flatten(value: Any, name: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, one in value.items():
            _flatten(one, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            _flatten(one, f"{name}/{i}", found)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """`yes`, or what differs."""
    if a.keys() != b.keys():
        return f"no: other tensors {sorted(a.keys() ^ b.keys())[:3]}"
    off = [name for name in a if not torch.equal(a[name], b[name])]
    return f"no: {len(off)} of {len(a)} tensors, {off[:3]}" if off else "yes"


def sparse(state: dict[str, torch.Tensor], pattern: str) -> str:
    """How many weights hold the pattern, of those that are no optimizer's."""
    held = [
        name
        for name, x in state.items()
        if x.ndim >= 2 and not name.startswith("optimizer") and "/optimizer" not in name
        and x.shape[1] % int(pattern.split(":")[1]) == 0 and nmflow.holds(x, pattern)
    ]  # fmt: skip
    return f"{len(held)} weights hold {pattern}" + (
        f", {sum('ema' in name for name in held)} in the EMA"
        if any("ema" in n for n in held)
        else ""
    )


def main(asked: list[str]) -> None:
    """Print one row a script."""
    both = "--control" in asked
    clones, *names = (one for one in asked if one != "--control")
    clones = Path(clones).resolve()
    for name, script in SCRIPTS.items():
        if names and name not in names:
            continue
        row = [name, str(lines(script, (clones / script.file).read_text(encoding="utf-8")))]
        for ours in (False, True) if both else (True,):
            whole = run(script, clones, ours, False)
            if script.resume is None:
                row.append("has none")
            else:
                row.append(equal(whole, run(script, clones, ours, True)))
            if ours:
                row.append(sparse(whole, script.pattern))
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
