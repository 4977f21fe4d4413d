"""Whatever stands behind a command is a configuration or one line: never a traceback."""

import shlex

import pytest
from fedsplit.apps.cli import main
from fedsplit.apps.config import absolute, load_config
from fedsplit.apps.overrides import PATHS, PATHS_OR_NAMES, groups
from fedsplit.apps.values import plain
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError

KEYS = [
    *("rounds", "seed", "train.batch_size", "train.optimizer.lr", "train.optimizer", "fleet.types"),
    *("strategy.cut", "codec.uplink", "codec.uplink.name", "model.config", "aggregator.eta"),
    *("channel.fading.kind", "fleet.members", "run.threads", "link.bind", "evaluate.every"),
    *groups(),
    *PATHS,
    *PATHS_OR_NAMES,
]
JUNK = [
    "",
    "null",
    "~",
    "-1",
    "1e18",
    "nan",
    "[]",
    "{}",
    "{a: 1}",
    "[1,2",
    "${seed}",
    "${",
    "'",
    "\\",
]
VALUES = st.one_of(
    st.sampled_from(JUNK),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
WRITTEN = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS),
    st.sampled_from(["=", "=", "=", "=", ":", "==", "@x=", ".more="]),
    VALUES,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@example(["resume='"])
@example(["model=${oc.env:HOME}"])
@given(st.lists(WRITTEN, max_size=3))
def test_never_a_traceback(overrides: list[str]) -> None:
    if any(word.startswith("-") for word in overrides):
        return
    assert main(["run", "--cfg", *overrides]) in (0, 2)


NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/$"), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(NAMES.filter(lambda name: name not in ("null", ".", "..") and name[0] not in "'\"~"))
def test_a_path_means_the_same_on_the_server(name: str) -> None:
    """As written by the user, and as it travels to the server app in the run configuration."""
    config = load_config([f"data.path={name}", "data=text", f"link.root={name}"])
    assert config.data.path.endswith(f"/{name}")
    travelled = shlex.split(
        shlex.join(absolute(["data=text", f"data.path={name}", f"link.root={name}"], config))
    )
    assert plain(load_config(travelled)) == plain(config)


@pytest.mark.parametrize("text", ["a: [", "'quoted", "x" * 5000])
def test_a_long_or_odd_word_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--cfg", text]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FedsplitError):
        load_config([text])
