"""Configs that are right: shipped ones, overrides, YAML's numbers and words, the reference."""

import json
from pathlib import Path

import pytest
import yaml

from coterie.core.errors import UserError
from coterie.launch.check import check_data, check_world
from coterie.launch.config_file import shipped_names
from coterie.launch.load_config import dump_config, load_config
from coterie.launch.main import main
from coterie.launch.schema import all_keys
from coterie.launch.yaml_source import parse


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configs_are_right(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(("name", "world"), [("mixtral_8x7b", 64), ("deepseek_v3_like", 256)])
def test_large_configs_fit_their_clusters_and_miss_their_data(name: str, world: int) -> None:
    config = load_config(name)
    check_world(config, world)
    with pytest.raises(UserError, match=r"data\.path: /data/\w+: .*coterie data build"):
        check_data(config)


def test_mixtral_has_the_published_size() -> None:
    model = load_config("mixtral_8x7b").model
    assert model.moe is not None and model.attention.kv_heads is not None
    head = model.width // model.attention.heads
    attention = 2 * model.width * head * (model.attention.heads + model.attention.kv_heads)
    moe = model.moe.experts.count * (3 * model.width * model.moe.experts.hidden + model.width)
    total = model.layers * (attention + moe) + 2 * model.vocabulary * model.width
    assert total / 1e9 == pytest.approx(46.7, abs=0.05)


def test_overrides_reach_every_depth(place: Path) -> None:
    config = load_config(
        "good.yaml",
        [
            *("train.steps=1_000", "optimizer.lr=1e-3", "model.moe.router.k=3", "name='on'"),
            *("model.moe.shared.hidden=8", "optimizer={warmup: 3}", "optimizer.clip=null"),
            *("evaluation.prompts=[a digit seven, yes]", "data.path=a=b"),
        ],
    )
    assert config.train.steps == 1000 and config.name == "on" and config.optimizer.clip is None
    assert config.optimizer.lr == 3e-3  # the group was replaced after it had been set
    assert config.model.moe is not None and config.model.moe.router.k == 3
    assert config.model.moe.shared is not None and config.model.moe.shared.hidden == 8
    assert config.evaluation.prompts == ("a digit seven", "yes") and config.data.path == "a=b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("{on: 1}", {"on": 1}),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    found, _ = parse(text, "here")
    assert found == value and type(found) is type(value)


def test_aliases_are_followed() -> None:
    assert parse("{a: &x [1, 2], b: *x}", "here")[0] == {"a": [1, 2], "b": [1, 2]}


def test_every_key_is_described() -> None:
    keys = list(all_keys())
    assert [key.name for key in keys if not key.description] == []
    assert [key.name for key in keys if key.accepts == "any value"] == []
    # kinds of routers share names of keys, each with its own description
    of_routers = [key for key in keys if key.name.startswith("model.moe.router.")]
    assert len({(key.name, key.description) for key in of_routers}) == len(of_routers)
    others = [key.name for key in keys if key not in of_routers]
    assert len(set(others)) == len(others) > 60


def test_show_prints_yaml_that_loads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "good.yaml", "train.steps=7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["steps"] == 7 and shown["model"]["moe"]["router"]["score"] == "softmax"


def test_schema_prints_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", "optimizer.lr"]) == 0
    assert capsys.readouterr().out.split() == (
        ["optimizer.lr", "a", "number", ">", "0", "default", "0.003", "Peak", "learning", "rate."]
    )
    assert main(["config", "schema", "--json"]) == 0
    assert "train" in json.loads(capsys.readouterr().out)["required"]
