"""Every command of the documentation runs, or is at least read by the program that it starts.

A command that stands in no table here fails. Long ones get smaller settings behind their own.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from fedsplit.apps.arguments import parse
from fedsplit.apps.cli import main
from fedsplit.apps.config import load_config, require_plain
from fedsplit.apps.overrides import expand_sweeps
from fedsplit.apps.sweep import members
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from .pages import PAGES, ROOT, commands, outputs, unmarked

COMMANDS = sorted({command for page in PAGES for command in commands(page)})
OUTPUTS = [output for page in PAGES for output in outputs(page)]


@dataclass(frozen=True)
class Run:
    """Runs as it stands, with `more` behind it; `prints` is found in what it shows.

    `after` is what has to be run before.
    """

    more: str = ""
    prints: str = ""
    slow: bool = True
    after: str = ""


@dataclass(frozen=True)
class NotHere:
    """Cannot run in a test; what it starts reads its words."""

    why: str


_SMALL = "rounds=1 train.steps=1 train.batch_size=2 fleet.devices=2 data.max_samples=64"
_TINY = f"{_SMALL} data.seq_len=32"
_FEW = f"{_TINY} seed=0,1 strategy=splitfed,gsfl"
_FEW_TEXTS = "--texts 4 --private 2"
_STUDY = f"fedsplit run -m output=outputs/study {_FEW}"
_TRAINED = r"│ +1 │ +[\d.]+ │"
_TO_SITE = "--quiet --no-deps --no-build-isolation --no-index --target site"
_HUB = NotHere("needs the Hugging Face hub")
_FLOWER = NotHere("starts Flower's SuperLink; tests/examples and tests/system do")
_MACHINES = NotHere("is one of several machines; tests/system/test_deploy.py starts them all")
_INSTALLS = NotHere("installs the project itself, which .ci/run does in a fresh environment")
_LONG = NotHere("takes minutes; tests/apps/test_reproduce.py makes the same comparisons")

# By how they begin. `fedsplit plan` is hardly here: nearly all of these run as they stand.
TABLE: Mapping[str, Run | NotHere] = {
    "fedsplit run": Run(_TINY, _TRAINED, slow=False),
    "fedsplit run --cfg": Run("", r"source: package:default", slow=False),
    "fedsplit run model=gpt2": _HUB,
    "fedsplit run data=hub data.name=imdb": _HUB,
    "fedsplit run model=/path/to/checkpoint": Run(f"{_TINY} strategy.cut=1", _TRAINED),
    "fedsplit run data=text data.path=notes/": Run(_TINY, _TRAINED),
    "fedsplit run data=text data.path=pairs.csv data.prompt_column=question "
    "data.target_column=answer": Run(_TINY, _TRAINED),
    "fedsplit run data=text data.partition=local": Run(_TINY, _TRAINED),
    "fedsplit run data=chat": Run(f"{_TINY} data.seq_len=64", _TRAINED),
    "fedsplit run data=e2e": Run(_TINY, _TRAINED),
    "fedsplit run 'model.lora=": Run(_TINY, _TRAINED),
    "fedsplit run data=classification": Run(_TINY, r"macro F1"),
    "fedsplit run strategy=vanilla": Run(_TINY, _TRAINED),
    "fedsplit run strategy.tail=1": Run(_TINY, _TRAINED),
    "fedsplit run model.r_by_device=": Run(_TINY.replace("fleet.devices=2 ", ""), _TRAINED),
    "fedsplit run train.device_adapters=false": Run(_TINY, _TRAINED),
    "fedsplit run strategy=splitfrozen": Run(_TINY, _TRAINED),
    "fedsplit run run.quorum_devices=3": Run(_TINY.replace("fleet.devices=2 ", ""), _TRAINED),
    "fedsplit run fleet.dropout.probability=": Run(_TINY, _TRAINED),
    "fedsplit run fleet.budget_j=": Run(_TINY, _TRAINED),
    "fedsplit run resume=outputs/mine": Run(
        "rounds=2", r"│ +2 │ +[\d.]+ │", after=f"fedsplit run output=outputs/mine {_TINY}"
    ),
    "fedsplit run codec=sft": Run(_TINY, _TRAINED),
    "fedsplit run strategy=cpsl": Run(_TINY, _TRAINED),
    "fedsplit run strategy=gsfl strategy.groups=2": Run(_TINY, _TRAINED),
    "fedsplit run strategy=gsfl strategy.cut=1 model=resnet": Run(_SMALL, _TRAINED),
    "fedsplit run strategy=sft": Run(_TINY, _TRAINED),
    "fedsplit run strategy=sft strategy.codec_table=null": Run(_TINY, _TRAINED),
    "fedsplit run strategy=sft model=vit": Run(_SMALL, _TRAINED),
    "fedsplit run strategy=splitllm": Run(f"{_TINY} fleet.edges=2", _TRAINED),
    "fedsplit run strategy=my_scheme": Run(_TINY, _TRAINED),
    "fedsplit run -m strategy=splitfed,sft channel.bandwidth_hz=20e6,5e6": Run(
        _TINY, r"table\.csv"
    ),
    "fedsplit run -m strategy=splitfed,sft,gsfl": Run(_FEW, r"table\.csv"),
    "fedsplit run -m study=schemes": NotHere("takes hours; tests/apps/test_sweep.py expands it"),
    "fedsplit report outputs/schemes": NotHere("is of the study that takes hours"),
    "fedsplit plot outputs/study": Run("", r"\.csv", after=_STUDY),
    "fedsplit plot outputs/study --kind labels": Run("", r"labels\.csv", after=_STUDY),
    "fedsplit plot outputs/study --kind map": Run("", r"map\.csv", after=_STUDY),
    "fedsplit report outputs/study": Run("", r"outputs/study/report", after=_STUDY),
    "fedsplit report outputs/bands": Run(
        "",
        r"outputs/bands/report",
        after="fedsplit run -m strategy=splitfed,sft channel.bandwidth_hz=20e6,5e6 seed=0,1 "
        f"output=outputs/bands {_TINY}",
    ),
    "fedsplit run data=text data.path=notes/ evaluate.central": Run(_TINY, _TRAINED),
    "fedsplit export outputs/tuned --merge": Run(
        "", r"round 1 of .*written to .*merged", after=f"fedsplit run output=outputs/tuned {_TINY}"
    ),
    "fedsplit generate outputs/tales": Run(
        "--max-new-tokens 4", "", after=f"fedsplit run output=outputs/tales {_TINY}"
    ),
    "fedsplit calibrate": Run(f"--steps 1 --grid grid.yaml {_TINY}", r"codecs\.csv"),
    "fedsplit calibrate --grid ways.yaml": Run(f"--steps 1 {_TINY}", r"quality\.csv"),
    "fedsplit run strategy=joint strategy.codec_table=quality.csv": Run(
        _TINY,
        _TRAINED,
        after=f"fedsplit calibrate --grid ways.yaml --output quality.csv --steps 1 {_TINY}",
    ),
    "fedsplit audit": Run(f"{_FEW_TEXTS} {_TINY}", "a curious server"),
    "fedsplit audit -m": Run(f"{_FEW_TEXTS} {_TINY}", "a curious server"),
    "fedsplit audit -m strategy.cut=1,2,3,4,5": Run(f"{_FEW_TEXTS} {_TINY}", "a curious server"),
    "fedsplit plan strategy=fast privacy.audit=": Run(
        "",
        r"scenario +s +s",
        after=f"fedsplit audit -m strategy.cut=1,2 --output outputs/cuts {_FEW_TEXTS} {_TINY}",
    ),
    "fedsplit audit outputs/nopeek": Run(
        _FEW_TEXTS,
        "correlation 10",
        after=f"fedsplit run privacy=nopeek privacy.correlation_weight=10 output=outputs/nopeek "
        f"{_TINY}",
    ),
    "fedsplit run privacy=nopeek": Run(_TINY, _TRAINED),
    "fedsplit run privacy=bottleneck": Run(_TINY, _TRAINED),
    "fedsplit run rounds=2 privacy=noise": Run(_TINY, "epsilon"),
    "fedsplit reproduce all": _LONG,
    "fedsplit reproduce card --train": Run(f"--seeds 1 {_TINY}", "Trained for real"),
    "fedsplit reproduce card": Run("--seeds 1", r"(?i)card"),
    "fedsplit deploy conf/deploy/example.yaml": Run("", r"\nflwr run ", slow=False),
    "fedsplit deploy conf/deploy/example.yaml --start": _MACHINES,
    "pip install ./examples/my_scheme": Run(f"{_TO_SITE} --upgrade", slow=False),
    "pip install": _INSTALLS,
    "python3 -m venv": _INSTALLS,
    ". .venv/bin/activate": _INSTALLS,
    "pre-commit install": NotHere("writes to the repository's .git"),
    ".ci/": _INSTALLS,
    "pytest": NotHere("is this"),
    "python -m benchmarks.": NotHere("takes many minutes"),
    "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1\nflwr run": _FLOWER,
    "cd examples/own_flower_app": _FLOWER,
    "flower-superlink": _MACHINES,
    "flower-supernode": _MACHINES,
    "job=": _MACHINES,
    "docker compose": NotHere("needs Docker; tests/apps/test_deploy.py reads the file"),
    "mkdir -p certs": Run("openssl verify -CAfile ca.crt server.crt", "OK", slow=False),
    "ssh-keygen": Run("", slow=False),
}


def entry(command: str) -> Run | NotHere | None:
    """Return what the table says of a command: its longest beginning that stands there."""
    if command == "fedsplit run":
        return TABLE[command]
    begins = [start for start in TABLE if command.startswith(start) and start != "fedsplit run"]
    if begins:
        return TABLE[max(begins, key=len)]
    return Run("", r"scenario +s +s", slow=False) if command.startswith("fedsplit plan ") else None


def test_every_command_is_run_or_said_why_not() -> None:
    assert len(COMMANDS) > 50
    assert [command for command in COMMANDS if entry(command) is None] == []


def test_the_table_holds_no_command_that_is_gone() -> None:
    gone = [start for start in TABLE if not any(item.startswith(start) for item in COMMANDS)]
    assert gone == []


def test_every_command_is_in_a_marked_block() -> None:
    assert {page.name: unmarked(page) for page in PAGES if unmarked(page)} == {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Return a folder with all that the commands name, such as a reader would have."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "conf").symlink_to(ROOT / "conf")
    # The build of a package leaves files beside its sources.
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "notes").mkdir()
    for word in ("red", "green", "blue", "grey"):
        lines = (f"{word} line {n}: {word} things are {n * n} times {word}." for n in range(40))
        (folder / "notes" / f"{word}.txt").write_text("\n\n".join(lines))
    for site, word in (("site-a", "red"), ("site-b", "blue")):
        (folder / site).mkdir()
        shutil.copy(folder / "notes" / f"{word}.txt", folder / site / "notes.txt")
    pairs = [(f"What is {n}?", f"It is {n * n}.") for n in range(40)]
    for name, header in (("pairs.csv", "question,answer"), ("e2e/devset.csv", "mr,ref")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join([header, *(f"{a},{b}" for a, b in pairs)]))
    shutil.copy(folder / "e2e" / "devset.csv", folder / "e2e" / "testset_w_refs.csv")
    said = "\n".join(f"it is {'good' if n % 2 else 'bad'} {n}\t{n % 2}" for n in range(40))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(f"sentence\tlabel\n{said}")
    talks = (
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs
    )
    lines = (json.dumps({"messages": talk}) + "\n" for talk in talks)
    (folder / "talks.jsonl").write_text("".join(lines))
    for name in ("checkpoint", "FOLDER"):
        shutil.copytree(tiny_checkpoint, folder / name)
    (folder / "FOLDER" / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}> {{ message.content }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    (folder / "boards.csv").write_text(
        "name,flops_per_s,memory_bytes,power_w\npi5,3e10,4e9,5\nnuc,4e11,1.6e10,28\n"
    )
    rates = (f"{turn},{device},2e7,4e7\n" for turn in (0, 1) for device in range(4))
    (folder / "rates.csv").write_text(f"round,device,uplink_bps,downlink_bps\n{''.join(rates)}")
    (folder / "grid.yaml").write_text("- {name: int8}\n- {name: topk, keep: 0.5, bits: 4}\n")
    (folder / "ways.yaml").write_text("- {name: rank, r: 4}\n- {name: frozen, cut: 1}\n")
    done = shell(f"pip install ./examples/my_scheme {_TO_SITE}", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def reader(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go where the reader is, with the example of a scheme installed."""
    monkeypatch.syspath_prepend(place / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "site"), str(ROOT)]))
    monkeypatch.setenv("COLUMNS", "120")
    # What is found out about the model in one command is known in the next, as it is to a reader.
    monkeypatch.setenv("FEDSPLIT_CACHE", str(place / "known"))
    monkeypatch.chdir(place)
    return place


def shell(text: str, folder: Path, patience_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Have a shell run `text` with this Python, and this project for `fedsplit`."""
    python = f'{shlex.quote(sys.executable)} "$@"'
    module = f'{shlex.quote(sys.executable)} -m "$@"'
    return subprocess.run(
        [
            "bash",
            "-euc",
            f'python() {{ {python}; }}; pip() {{ set -- pip "$@"; {module}; }}; '
            f'fedsplit() {{ set -- fedsplit.apps "$@"; {module}; }}; {text}',
        ],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=False,
    )


def typed(command: str, more: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return exit code and output of a command as it stands, with `more` behind it."""
    text = command.replace("/path/to/", "./")
    joined = "\n" if "\n" in text else " "
    if re.match(r"fedsplit (plan|plot|report|deploy|reproduce|run --cfg)", text):
        capsys.readouterr()
        code = main(shlex.split(f"{text} {more}")[1:])
        shown = capsys.readouterr()
        return code, shown.out + shown.err
    done = shell(f"{text}{joined}{more}", Path.cwd())
    return done.returncode, done.stdout + done.stderr


def _runs() -> list[object]:
    found = ((command, entry(command)) for command in COMMANDS)
    return [
        pytest.param(command, how, marks=[pytest.mark.slow] * how.slow, id=command)
        for command, how in found
        if isinstance(how, Run)
    ]


@pytest.mark.parametrize(("command", "how"), _runs())
def test_it_runs(command: str, how: Run, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if how.after:
        assert typed(how.after, "", capsys)[0] == 0
    code, shown = typed(command, how.more, capsys)
    assert code == 0, shown
    assert re.search(how.prints, shown), shown
    assert "Traceback" not in shown
    told = [output for output in OUTPUTS if command.startswith(output.command)]
    lines = [line.rstrip() for line in shown.splitlines()]
    for output in told:
        assert list(output.lines) == [line for line in lines if line in output.lines], shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_job_ends_as_the_readme_says(reader: Path) -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    figures = re.search(r"from ([\d.]+) to ([\d.]+), perplexity from (\d+) to (\d+)", readme)
    assert figures is not None
    done = shell("fedsplit run output=whole", reader, patience_s=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads((reader / "whole" / "results.json").read_text())["rounds"]
    first, last = (rounds[place]["eval_loss"] for place in (0, -1))
    found = (f"{first:.2f}", f"{last:.2f}", f"{math.exp(first):.0f}", f"{math.exp(last):.0f}")
    assert figures.groups() == found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_splitllm_trains_as_its_page_shows(reader: Path) -> None:
    page = (ROOT / "docs" / "schemes" / "splitllm.md").read_text()
    (command,) = (item for item in COMMANDS if item.startswith("fedsplit run strategy=splitllm"))
    shown = re.findall(r"^round \d/4  .*$", page, re.MULTILINE)
    done = shell(command, reader, patience_s=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(shown) == 5
    assert [line for line in shown if f"\n{line}" not in done.stdout] == []


def test_every_output_is_of_one_command_that_runs() -> None:
    assert len(OUTPUTS) >= 10
    for output in OUTPUTS:
        (command,) = [item for item in COMMANDS if item.startswith(output.command)]
        assert isinstance(entry(command), Run)
        assert len(output.lines) > 3


STUBS = ("pip", "flwr", "docker", "fedsplit", "python", "pytest")
STUBS += ("flower-superlink", "flower-supernode", "python3", "pre-commit", ".ci/run", ".ci/floor")


def words(command: str, folder: Path) -> list[list[str]]:
    """Return what a shell would start, word by word."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    script = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n"
    for name in (item for item in STUBS if "/" not in item):
        (stubs / name).write_text(script)
        (stubs / name).chmod(0o755)
    text = re.sub(r"^\. \S+|^\.ci/\S+", "true", command)
    environment = {**os.environ, "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    started = map(json.loads, done.stdout.splitlines())
    return [[Path(name).name, *arguments] for name, *arguments in started]


@pytest.mark.parametrize("command", [item for item in COMMANDS if isinstance(entry(item), NotHere)])
def test_what_cannot_run_is_read_by_its_program(command: str, reader: Path) -> None:
    how = entry(command)
    assert isinstance(how, NotHere)
    assert how.why
    for name, *arguments in words(command.replace("/path/to/", "./"), reader):
        READ[name](arguments)


def _read_fedsplit(arguments: list[str]) -> None:
    options = parse(arguments)
    for override in getattr(options, "overrides", []):
        expand_sweeps([override], True)
    if arguments[0] == "run" and options.multirun:
        assert members(options.overrides, multirun=True)
    elif arguments[0] == "run":
        require_plain(load_config(options.overrides))


def _read_flwr(arguments: list[str]) -> None:
    """Flower's own parser of KEY=VALUE, and ours of the overrides within."""
    assert arguments[0] in ("run", "supernode")
    for option in ("--run-config", "--federation-config"):
        if option in arguments:
            given = parse_config_args([arguments[arguments.index(option) + 1]])
            require_plain(load_config(shlex.split(str(given.get("hydra", "")))))


def _read_supernode(arguments: list[str]) -> None:
    options = _parse_args_run_supernode().parse_args(arguments)
    keys = set(parse_config_args([options.node_config]))
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert keys <= set(re.findall(r"`([\w-]+)`", page[page.index("| node-config |") :]))


def _read_superlink(arguments: list[str]) -> None:
    _parse_args_run_superlink().parse_args(arguments)


def _read_pip(arguments: list[str]) -> None:

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    for extra in re.findall(r"\[(.*?)\]", arguments[-1]):
        assert extra in project["optional-dependencies"]


def _read_python(arguments: list[str]) -> None:
    assert arguments[0] == "-m"
    assert importlib.util.find_spec(arguments[1]) is not None


def _read_docker(arguments: list[str]) -> None:
    assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()


READ = {
    "fedsplit": _read_fedsplit,
    "flwr": _read_flwr,
    "flower-supernode": _read_supernode,
    "flower-superlink": _read_superlink,
    "pip": _read_pip,
    "python": _read_python,
    "python3": _read_python,
    "docker": _read_docker,
    "pre-commit": lambda arguments: None,
    "pytest": lambda arguments: None,
}
