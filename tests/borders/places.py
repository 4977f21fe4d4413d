"""Files for tests at the borders of what a user may bring: broken ones, and odd but right ones."""

import json
from pathlib import Path

import yaml
from fedsplit.apps.config import load_config
from fedsplit.apps.values import plain

TRACE = "round,device,uplink_bps,downlink_bps\n" + "".join(
    f"0,{device},{2e7 + device},4e7\n" for device in range(4)
)
TEXT = "\n\n".join(
    f"Paragraph {n} says that {n} times {n} is {n * n}, as it must." for n in range(80)
)


COLUMNS = "ratio,loss_increase,name,settings\n"
WAYS = {
    "rank_0": "{name: rank, r: 0}",
    "rank_99": "{name: rank, r: 99}",
    "rank_of": "{name: rank, cut: 2}",
    "frozen_9": "{name: frozen, cut: 9}",
}
"""Grids of ways to train that there are not."""


def broken(folder: Path) -> None:
    """Write what the table of wrong inputs names."""
    (folder / "x.txt").write_text("x")
    (folder / "latin.txt").write_bytes("é".encode("latin-1") * 50)
    (folder / "empty.csv").write_text("")
    (folder / "labelled.csv").write_text("text,label\n" + "x,a\ny,b\nz,c\n" * 9)
    (folder / "bad.yaml").write_text("a: [1")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    for name, line in WAYS.items():
        (folder / f"{name}.yaml").write_text(f"- {line}\n")
    (folder / "quality.csv").write_text(f'{COLUMNS}1,0.1,rank,"{{""r"": 2}}"\n')
    (folder / "ranks.csv").write_text(f'{COLUMNS}1,0.1,rank,"{{""r"": 0}}"\n')
    (folder / "mapping.yaml").write_text("name: topk\n")
    (folder / "topology.yaml").write_text("superlink: nowhere\nlink: {bind: a:1}\ndevices: 2\n")
    (folder / "keys.yaml").write_text("superlink: a:1\nlink: {bind: a:1}\ndevices: 2\nedgess: []\n")
    (folder / "sites.yaml").write_text(
        "superlink: a:1\nlink: {bind: a:1}\ndevices: 2\nsites: [a]\n"
    )
    (folder / "job.yaml").write_text(
        "superlink: a:1\nlink: {bind: a:1}\ndevices: 2\noverrides: [roundz=3]\n"
    )
    (folder / "negative.csv").write_text(TRACE.replace("20000000.0", "-1"))
    (folder / "gap.csv").write_text(TRACE.replace("0,2,", "0,7,"))
    (folder / "table.csv").write_text("ratio,loss_increase,name,settings\n0.5,x,topk,{}\n")
    saved = yaml.safe_dump(plain(load_config(["rounds=3"])))
    (folder / "folder").mkdir()
    (folder / "folder" / "config.json").write_text("{")
    for name, config, results in (
        ("corrupt", "a: [", "{}"),
        ("listed", "- 1", "{}"),
        ("foreign", "foo: 1", "{}"),
        ("half", None, '{"rounds": ['),
        ("other", None, "[]"),
        ("records", None, '{"rounds": [{"round": "x"}]}'),
        ("unbegun", None, '{"rounds": []}'),
    ):
        place = folder / name
        place.mkdir()
        (place / "config.yaml").write_text(saved if config is None else config)
        (place / "results.json").write_text(results)
    (folder / "checkpoint" / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.yaml").write_text(saved)
    (folder / "checkpoint" / "results.json").write_text(json.dumps({"rounds": []}))
    (folder / "directory" / "config.yaml").mkdir(parents=True)
    (folder / "directory" / "results.json").mkdir()
