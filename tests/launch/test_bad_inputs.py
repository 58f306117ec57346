"""Every mistake of the user ends in exit code 2 and one sentence that says where it is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from coterie.launch.main import main

ROOT = Path(__file__).resolve().parents[2]

SHOW = ["config", "show", "bad.yaml"]
TRAIN = ["train", "good.yaml", "--nproc"]
FUSED = ["model.width=64", "model.moe.experts.hidden=128", "model.moe.exchange.kind=fused"]

# what bad.yaml holds; what the sentence must contain
FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["bad.yaml", "empty", "'model'"]),
    "only a comment": ("# nothing yet\n", ["bad.yaml", "empty"]),
    "a list": ("- model\n- train\n", ["bad.yaml", "holds a list", "mapping"]),
    "one word": ("quickstart\n", ["bad.yaml", "holds one value", "mapping"]),
    "open bracket": ("model: {width: [1\n", ["bad.yaml:2", "not YAML", "']'"]),
    "a tab": ("model:\n\twidth: 3\n", ["bad.yaml:2", "not YAML", "spaces, not tabs"]),
    "two colons": ("model: width: 3\n", ["bad.yaml:1", "not YAML", "column 13"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["bad.yaml:2", "not YAML"]),
    "a key twice": (
        "train:\n  steps: 1\n  steps: 2\n",
        ["bad.yaml:3", "train.steps is given twice", "line 2"],
    ),
    "a tag": ("train: !!python/object/apply:os.system [ls]\n", ["bad.yaml:1", "tag"]),
    "a list as key": ("? [a, b]\n: 1\n", ["bad.yaml:1", "a key must be a word"]),
    "an unknown alias": ("train: *base\n", ["bad.yaml:1", "undefined alias"]),
    "an endless alias": ("train: &a [*a]\n", ["bad.yaml", "nested too deeply"]),
    "a bomb of aliases": (
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 8)}]\n" for n in range(12)),
        ["bad.yaml", "more than 100000 values"],
    ),
    "too deep": ("[" * 5000, ["bad.yaml", "nested too deeply"]),
    "Latin-1": (b"name: caf\xe9\n", ["bad.yaml", "not UTF-8", "byte 9 is 0xe9"]),
    "UTF-16": ("name: x\n".encode("utf-16"), ["bad.yaml", "not UTF-8", "byte 0"]),
    "a null byte": ("name: a\0b\n", ["bad.yaml", "not YAML", "special characters"]),
    "too large": ("x" * (1 << 21), ["bad.yaml", "2097152 bytes"]),
}

# overrides of good.yaml; what the sentence must contain
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "no equals": (["train.steps"], ["override 'train.steps'", "key.sub=value"]),
    "no key": (["=3"], ["override '=3'", "no dotted key"]),
    "an empty part": (["train..steps=3"], ["'train..steps' is no dotted key"]),
    "below a number": (["train.steps.x=3"], ["train.steps is no group", "good.yaml"]),
    "open bracket": (["optimizer.betas=[0.9"], ["override 'optimizer.betas=[0.9'", "not YAML"]),
    "misspelt key": (["train.stesp=3"], ["no key train.stesp", "did you mean 'train.steps'"]),
    "misspelt group": (["modle.width=3"], ["no key modle", "did you mean 'model'"]),
    "key of another group": (["lr=3"], ["no key lr", "did you mean 'optimizer.lr'"]),
    "strange key": (["xyzzy=3"], ["no key xyzzy", "accepts name, model, data"]),
    "too small": (["train.steps=0"], ["train.steps is 0", "a whole number ≥ 1"]),
    "too large": (["optimizer.final_lr=2"], ["optimizer.final_lr is 2", "≤ 1"]),
    "text for a number": (["train.steps=many"], ["train.steps is 'many'", "whole number"]),
    "a number in quotes": (["train.steps='3'"], ["train.steps is '3'", "without quotes"]),
    "a float for a whole": (["train.steps=1e3"], ["is 1000.0", "write 1000"]),
    "a boolean for a number": (["train.steps=true"], ["train.steps is true", "whole number"]),
    "yes": (["model.tie_embeddings=yes"], ["model.tie_embeddings is 'yes'", "write true"]),
    "off": (["model.tie_embeddings=off"], ["model.tie_embeddings is 'off'", "write false"]),
    "a number for a boolean": (
        ["model.tie_embeddings=1"],
        ["model.tie_embeddings is 1", "true or false"],
    ),
    "a boolean for a choice": (
        ["train.recompute=true"],
        ["train.recompute is true", "none or selective or full"],
    ),
    "an unknown schedule": (
        ["parallel.schedule=zvb"],
        ["parallel.schedule is 'zvb'", "1f1b or interleaved", "did you mean 'zbv'"],
    ),
    "an axis of none": (["parallel.tp=0"], ["parallel.tp is 0", "a whole number ≥ 1"]),
    "a number for text": (["data.path=5"], ["data.path is 5", "put it in quotes"]),
    "nothing for a number": (["train.steps="], ["train.steps is null", "whole number"]),
    "not a number": (["optimizer.lr=.nan"], ["optimizer.lr is nan", "a number > 0"]),
    "infinite": (["optimizer.lr=.inf"], ["optimizer.lr is inf"]),
    "overflowing": (["optimizer.lr=1e999"], ["optimizer.lr is inf"]),
    "infinite in a list": (["optimizer.betas=[0.9,.inf]"], ["optimizer.betas.1 is inf"]),
    "unknown choice": (
        ["model.moe.router.score=softmx"],
        ["model.moe.router.score is 'softmx'", "softmax or sigmoid", "did you mean 'softmax'"],
    ),
    "an unknown kind of router": (
        ["model.moe.router.kind=top_g"],
        ["model.moe.router.kind is 'top_g'", "top_k or mlp or", "did you mean 'top_k'"],
    ),
    "a number for a kind of router": (
        ["model.moe.router.kind=3"],
        ["model.moe.router.kind is '3'", "top_k or mlp or"],
    ),
    "a number for a router": (["model.moe.router=3"], ["model.moe.router is 3", "a group of keys"]),
    "a wrong value in a kind of router": (
        ["model.moe.router={kind: random_fixed, first_k: 0}"],
        ["model.moe.router.first_k is 0", "a whole number ≥ 1"],
    ),
    "a misspelt key in a kind of router": (
        ["model.moe.router={kind: random_fixed, frist_k: 1}"],
        ["no key model.moe.router.frist_k", "did you mean 'model.moe.router.first_k'"],
    ),
    "a key of another kind of router": (
        ["model.moe.router.kind=random_fixed", "model.moe.router.z_loss=0"],
        ["no key model.moe.router.z_loss"],
    ),
    "a k that shrinks": (
        ["model.moe.router={kind: random_fixed, first_k: 3, k: 2}"],
        ["model.moe.router: ", "first_k 3 must be at most k 2"],
    ),
    "a number for a group": (["train=5"], ["train is 5", "a group of keys"]),
    "a group for a number": (["train.steps={a: 1}"], ["train.steps is a group of keys"]),
    "a list too long": (["optimizer.betas=[1,2,3]"], ["optimizer.betas", "a list of 2 values"]),
    "no list": (["model.dense_layers=1"], ["model.dense_layers is 1", "a list"]),
    "text in a list": (["model.dense_layers=[a]"], ["model.dense_layers.0 is 'a'"]),
    "a bad name": (["name=../up"], ["name is '../up'", "matches"]),
    "a group without its keys": (["model={}"], ["model.vocabulary is missing", "3 more mistakes"]),
    "two mistakes": (["train.steps=0", "train.seed=-1"], ["train.steps", "(and 1 more mistake)"]),
    "heads do not divide": (
        ["model.attention.heads=3"],
        ["model", "multiple of attention.heads 3"],
    ),
    "kv_heads do not divide": (["model.attention.kv_heads=3"], ["model.attention", "kv_heads 3"]),
    "more chosen than there are": (["model.moe.router.k=5"], ["model.moe", "k 5 exceeds the 4"]),
    "fused pieces": (
        [*FUSED, "model.moe.exchange.pieces=2"],
        [
            "model.moe.exchange",
            "pieces is for kind overlapped",
            "communication, slabs and tile_columns",
        ],
    ),
    "many fused slabs": (
        [*FUSED, "model.moe.exchange.slabs=17"],
        ["model.moe.exchange", "slabs is 17", "up to 16"],
    ),
    "blocks that move no rows": (
        ["model.moe.exchange.communication=8"],
        ["model.moe.exchange", "communication is for kind fused", "kind is all_to_all"],
    ),
    "tiles without kernels": (
        [*FUSED, "model.moe.exchange.tile_columns=64"],
        ["model.moe.exchange.tile_columns is 64", "must be 128 or 256 or null"],
    ),
    "tiles that nobody has": (
        ["model.moe.exchange.tile_columns=128"],
        ["model.moe.exchange", "tile_columns is for kind fused", "kind is all_to_all"],
    ),
    "fused gelu": (
        [*FUSED, "model.moe.experts.activation=gelu"],
        ["model.moe", "experts.activation is gelu", "swiglu is accepted"],
    ),
    "fused and thin": (
        [*FUSED, "model.moe.experts.hidden=64"],
        ["model.moe", "experts.hidden is 64", "multiples of 128"],
    ),
    "fused and narrow": ([*FUSED, "model.width=96"], ["model", "width is 96", "multiples of 64"]),
    "fused in fp32": (
        [*FUSED, "train.precision=fp32"],
        ["train.precision is fp32", "bf16 is accepted"],
    ),
    "groups do not divide": (["model.moe.router.groups=3"], ["model.moe", "3 groups"]),
    "a layer too many": (["model.dense_layers=[2]"], ["dense_layers", "0 to 1"]),
    "dense without width": (["model.dense_layers=[0]"], ["feed_forward is needed"]),
    "nothing dense to untie": (
        ["model.untie.ffn=true"],
        ["untie.ffn is of dense layers", "moe.router.kind"],
    ),
    "warm-up too long": (["optimizer.warmup=9"], ["optimizer.warmup 9", "train.steps 2"]),
    "too few steps to warm up": (
        ["optimizer.warmup=50", "train.steps=20"],
        ["optimizer.warmup 50", "train.steps 20; add optimizer.warmup=20 or less"],
    ),
    "accumulation": (["train.accumulation=3"], ["global_batch 8", "accumulation 3"]),
}

# command lines; what the sentence must contain
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (
        ["trian"],
        ["command 'trian'. Did you mean 'train'? See 'coterie --help'\n"],
    ),
    "unknown option": ([*TRAIN, "1", "--run_dir", "x"], ["--run_dir", "--run-dir"]),
    "no config": (["train"], ["CONFIG"]),
    "no processes": ([*TRAIN, "0"], ["--nproc"]),
    "half a process": ([*TRAIN, "1.5"], ["train: ", "--nproc", "valid integer"]),
    "missing file": (["train", "goood.yaml"], ["goood.yaml: there is no such file", "'good.yaml'"]),
    "missing folder": (["train", "no/such.yaml"], ["no/such.yaml", "no such file"]),
    "misspelt shipped config": (["train", "mixtral_8x7"], ["'mixtral_8x7'", "'mixtral_8x7b'"]),
    "folder as config": (["train", "runs/done"], ["runs/done: is a directory", "config.yaml"]),
    "device as config": (["train", "/dev/null"], ["/dev/null", "not a regular file"]),
    "ep does not divide the world": (
        [*TRAIN, "4", "parallel.ep=3"],
        ["parallel.ep is 3", "model.moe.experts.count 4", "fits instead: ep 1 or 2 or 4"],
    ),
    "ep does not divide the experts": (
        [*TRAIN, "8", "parallel.ep=8"],
        ["parallel.ep is 8", "model.moe.experts.count 4", "fits instead: ep 1 or 2 or 4"],
    ),
    "ep without experts": (
        [*TRAIN, "2", "parallel.ep=2", "model.moe=null", "model.feed_forward.hidden=8"],
        ["parallel.ep is 2", "no experts", "fits instead: ep 1"],
    ),
    "the layout does not divide the world": (
        [*TRAIN, "6", "parallel.dp_shard=4"],
        ["6 processes", "dp_shard 4", "fits instead: dp_shard 2 or 3 or 6"],
    ),
    "the layout is not the world": (
        [*TRAIN, "8", "parallel.dp_replicate=2"],
        ["dp_replicate 2 = 2", "processes is 8", "dp_replicate 8"],
    ),
    "heads over tp": (
        [*TRAIN, "4", "parallel.tp=4"],
        ["parallel.tp is 4", "model.attention.heads 2", "fits instead: tp 1 or 2"],
    ),
    "hidden over tp": (
        [*TRAIN, "2", "parallel.tp=2", "model.moe.shared.hidden=7"],
        ["parallel.tp is 2", "model.moe.shared.hidden 7", "fits instead: tp 1"],
    ),
    "hidden over etp": (
        [*TRAIN, "4", "parallel.etp=3"],
        ["parallel.etp is 3", "model.moe.experts.hidden 16", "etp 1 or 2 or 4"],
    ),
    "experts over the ranks of a stage": (
        [*TRAIN, "4", "parallel.pp=2", "parallel.ep=4"],
        ["ep 4", "the 2 ranks of a pipeline stage", "ep 1 or 2"],
    ),
    "experts over shards": (
        [*TRAIN, "12", "parallel.dp_shard=3", "parallel.ep=2"],
        ["with dp_shard 3", "must be multiples", "dp_shard 1 or 2 or 4"],
    ),
    "stages without a pipeline": (
        [*TRAIN, "2", "parallel.stages=[2]"],
        ["need a pipeline, but pp is 1", "stages null"],
    ),
    "vpp of a schedule": (
        [*TRAIN, "2", "parallel.pp=2", "parallel.schedule=zbv", "parallel.stages=[1,1]"],
        ["parallel.vpp is 1", "schedule zbv needs 2", "schedule 1f1b or zero_bubble"],
    ),
    "more stages than blocks": (
        [*TRAIN, "4", "parallel.pp=4"],
        ["4 stages (pp 4 × vpp 1)", "model.layers is 2", "pp 1 or 2"],
    ),
    "blocks of stages": (
        [*TRAIN, "2", "parallel.pp=2", "parallel.stages=[2,1]"],
        ["parallel.stages [2, 1]", "sum to model.layers 2", "stages null"],
    ),
    "a tied pipeline": (
        [*TRAIN, "2", "parallel.pp=2", "model.tie_embeddings=true"],
        ["parallel.pp is 2", "model.tie_embeddings", "fits instead: pp 1"],
    ),
    "the sequence over tp and cp": (
        [*TRAIN, "6", "parallel.cp=3", "parallel.tp=2"],
        ["data.sequence is 32", "multiple of 12", "use 24 or 36"],
    ),
    "few micro-batches for a pipeline": (
        [*TRAIN, "2", "parallel.pp=2"],
        ["train.accumulation is 1", "a pipeline of 2 ranks", "use 2 or more"],
    ),
    "odd micro-batches for a schedule": (
        [
            *(*TRAIN, "2", "parallel.pp=2", "parallel.schedule=zero_bubble"),
            *("train.accumulation=3", "train.global_batch=9"),
        ],
        ["train.accumulation is 3", "zero_bubble over 2 ranks", "use 2 or 4"],
    ),
    "batch does not divide": (
        [*TRAIN, "3"],
        ["train.global_batch is 8", "3 data-parallel ranks", "use 6 or 9"],
    ),
    "evaluation batch does not divide": (
        [*TRAIN, "8", "evaluation.batch=12"],
        ["evaluation.batch is 12", "8 data-parallel ranks", "use 8 or 16"],
    ),
    "the default world does not fit": (
        ["train", "good.yaml", "parallel.ep=4", "train.global_batch=6"],
        ["train.global_batch is 6", "4 data-parallel ranks"],
    ),
    "the default world of a layout": (
        ["train", "good.yaml", "parallel.tp=2", "parallel.dp_shard=4", "train.global_batch=6"],
        ["train.global_batch is 6", "4 data-parallel ranks"],
    ),
    "no dataset": (
        [*TRAIN, "1", "data.path=nowhere"],
        ["data.path", "nowhere", "coterie data build"],
    ),
    "folder without dataset": ([*TRAIN, "1", "data.path=empty"], ["data.path", "empty"]),
    "file as dataset": ([*TRAIN, "1", "data.path=file"], ["data.path", "file", "directory"]),
    "another sequence": (
        [*TRAIN, "1", "data.sequence=64"],
        ["data.sequence is 64", "sequences of 32", "data.sequence=32"],
    ),
    "small vocabulary": (
        [*TRAIN, "1", "model.vocabulary=256"],
        ["model.vocabulary is 256", "277 token ids", "model.vocabulary=277"],
    ),
    "small vocabulary for the built-in corpus": (
        [*TRAIN, "1", "model.vocabulary=256", "data.path=null"],
        ["model.vocabulary is 256", "built-in corpus", "277"],
    ),
    "fewer modalities than the data has": (
        [*TRAIN, "1", "model.untie.qkvo=true", "model.untie.modalities=1"],
        ["model.untie.modalities is 1", "2 modalities (text, image)", "modalities=2"],
    ),
    "experts of too few modalities": (
        [*TRAIN, "1", "model.moe.router={kind: modality, experts: [4]}"],
        ["model.moe.router.experts names 1", "2 modalities (text, image)"],
    ),
    "a shipped config without its data": (
        ["train", "deepseek_v3_like", "--nproc", "256"],
        ["data.path"],
    ),
    "a run already": (
        [*TRAIN, "1", "--run-dir", "runs/done"],
        ["runs/done: holds a run already", "coterie resume runs/done"],
    ),
    "run in a file": ([*TRAIN, "1", "--run-dir", "file"], ["file: is a file", "--run-dir"]),
    "run below a file": ([*TRAIN, "1", "--run-dir", "file/x"], ["file: is a file", "--run-dir"]),
    "resume what is not": (
        ["resume", "runs/dnoe"],
        ["runs/dnoe: there is no such run", "runs/done"],
    ),
    "resume an empty folder": (["resume", "empty"], ["empty: holds no config.yaml"]),
    "resume a file": (["resume", "file"], ["file: is a file"]),
    "resume a missing step": (["resume", "runs/done", "--step", "7"], ["runs/done", "step 7"]),
    "resume a damaged checkpoint": (["resume", "runs/broken"], ["step_00000002", "damaged"]),
    "resume with a bad override": (
        ["resume", "runs/done", "train.step=9"],
        ["train.step", "'train.steps'"],
    ),
    "resume on a wrong world": (["resume", "runs/done", "--nproc", "3"], ["global_batch is 8"]),
    "evaluate what is not": (["evaluate", "nowhere"], ["nowhere: there is no such run"]),
    "evaluate without checkpoint": (["evaluate", "runs/done"], ["runs/done", "no checkpoint"]),
    "evaluate at no number": (
        ["evaluate", "runs/done", "--k", "1,two"],
        ["--k 1,two", "whole numbers", "1,2,4"],
    ),
    "evaluate at more experts than there are": (
        ["evaluate", "runs/done", "--k", "2,9"],
        ["--k 9", "k 9 exceeds the 4"],
    ),
    "generate without prompt": (["generate", "runs/done"], ["--prompt"]),
    "generate from an empty prompt": (
        ["generate", "runs/done", "--prompt", ""],
        ["prompt is empty"],
    ),
    "generate at a negative temperature": (
        ["generate", "runs/done", "--prompt", "a", "--temperature", "-1"],
        ["--temperature"],
    ),
    "build from nothing": (["data", "build", "nowhere", "out"], ["nowhere", "no such directory"]),
    "build from an empty folder": (["data", "build", "empty", "out"], ["empty", "no text"]),
    "build from a file": (["data", "build", "file", "out"], ["file", "not a directory"]),
    "inspect no dataset": (["data", "inspect", "empty"], ["empty", "dataset.json"]),
    "verify nothing": (["data", "verify", "nowhere"], ["nowhere"]),
    "show for a wrong world": (
        ["config", "show", "mixtral_8x7b", "--nproc", "12"],
        ["12 processes", "dp_shard 16 = 64", "fits instead: 64 processes"],
    ),
    "schema of an unknown key": (["config", "schema", "model.mo"], ["'model.mo'", "'model.moe'"]),
    "config without sub-command": (["config", "shwo"], ["'shwo'", "show"]),
}

# variables of the environment; what the sentence must contain
ENVIRONMENTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "half of torchrun": ({"RANK": "0"}, ["RANK but not WORLD_SIZE"]),
    "a rank too high": ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK is 2", "0 to 1"]),
    "a rank in words": ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK is 'one'"]),
    "--nproc under torchrun": (
        {"RANK": "1", "WORLD_SIZE": "2"},
        ["--nproc 1", "torchrun", "2 processes"],
    ),
    "--nproc under srun": (
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "n1",
        },
        ["--nproc 1", "SLURM", "4 processes"],
    ),
}


def one_sentence(code: int, err: str, needles: list[str]) -> None:
    """Exit code 2, one line, no traceback, and everything it must name."""
    assert code == 2, err
    assert err.startswith("coterie: "), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and len(err) < 500
    for needle in needles:
        assert needle in err, (needle, err)


Fails = Callable[[list[str], list[str]], None]


@pytest.fixture
def fails(place: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """``fails(arguments, needles)``: the command ends in such a sentence, and leaves no trace."""

    def check(arguments: list[str], needles: list[str]) -> None:
        before = sorted(place.rglob("*"))
        one_sentence(main(arguments), capsys.readouterr().err, needles)
        assert sorted(place.rglob("*")) == before

    return check


@pytest.mark.parametrize("case", FILES)
def test_file(case: str, place: Path, fails: Fails) -> None:
    content, needles = FILES[case]
    file = place / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(SHOW, needles)


@pytest.mark.parametrize("case", OVERRIDES)
def test_override(case: str, fails: Fails) -> None:
    overrides, needles = OVERRIDES[case]
    fails(["config", "show", "good.yaml", *overrides], needles)


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case: str, fails: Fails) -> None:
    arguments, needles = COMMANDS[case]
    fails(arguments, needles)


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(case: str, fails: Fails) -> None:
    variables, needles = ENVIRONMENTS[case]
    with patch.dict(os.environ, variables):  # joining a SLURM step sets some of its own
        fails([*TRAIN, "1"], needles)


@pytest.mark.parametrize(
    ("key", "value", "needles"),
    [
        ("model.widht", 3, ["edited.yaml:", "model.widht", "'model.width'"]),
        ("model.width", ..., ["edited.yaml:2", "model.width is missing", "≥ 1", "Model width D"]),
        ("train", ..., ["edited.yaml", "train is missing"]),
        ("train.steps", -1, ["edited.yaml:18", "train.steps is -1"]),
        ("name", 2024, ["edited.yaml:1", "name is 2024", "put it in quotes"]),
    ],
)
def test_edited_file(
    key: str,
    value: object,
    needles: list[str],
    fails: Fails,
    config_with: Callable[[str, object], Path],
) -> None:
    fails(["config", "show", str(config_with(key, value))], needles)


def test_a_misspelt_compulsory_key_is_one_mistake(
    fails: Fails, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("good.yaml").read_text().replace("global_batch", "globl_batch")
    Path("bad.yaml").write_text(text)
    assert main(SHOW) == 2
    err = capsys.readouterr().err
    assert "bad.yaml:13: there is no key train.globl_batch" in err and "more mistake" not in err


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["train", "good.yaml", "train.stesp=3"], ["'train.steps'"]),
        (["train", "good.yaml", "--nproc", "2", "train.global_batch=3"], ["2 data-parallel ranks"]),
        (["train", "goood.yaml"], ["'good.yaml'"]),
        (
            ["train", "good.yaml", "--nproc", "2", "parallel.ep=2", *FUSED],
            ["model.moe.exchange.kind is fused, but rank 0 cannot run the fused kernels ("],
        ),
    ],
)
def test_through_a_real_process(place: Path, arguments: list[str], needles: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coterie.launch", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COTERIE_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == ""
    one_sentence(done.returncode, done.stderr, needles)
