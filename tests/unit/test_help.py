"""Help, printed configurations and schemas of every command's settings."""

import dataclasses
import json

import pytest
import yaml

from prx_post.base.help import render_schema, settings_of
from prx_post.base.parsing import parse
from prx_post.base.settings import check_fields, doc
from prx_post.cli import main
from prx_post.stages.registry import REGISTRY
from tests.test_configs import CONFIGS, KINDS


@dataclasses.dataclass
class Own:
    """What the example does.

    Not shown.
    """

    count: int = doc("How many.", 3, above=0)
    name: str | None = doc("What it is called.", None, required=("set", "it is shown"))
    kinds: list[str] = doc("Which of them.", ["a"], one_of=("a", "b"))
    rate: float | None = doc("How fast; null: not at all.", None, between=(0, 1), group="training")
    is_loud: bool = doc("Whether it is loud.", False)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def shown(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        parse([Own], args, "prx-post example")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_required_settings_first_types_defaults_and_limits(capsys):
    assert (
        shown(capsys, "--help")
        == """\
prx-post example: What the example does.

  prx-post example --config FILE
  prx-post example --name TEXT

Every setting may stand in the YAML file or on the command line, which wins. --print_config writes
such a file with what is given and every default, --print_schema its JSON schema.

example:
  --name TEXT
      What it is called. (required)
  --count N
      How many. (default 3; above 0)
  --kinds TEXT ...
      Which of them. (default a; one of a, b)
  --is_loud true|false
      Whether it is loud. (default false)

training:
  --rate X
      How fast; null: not at all. (from 0 to 1)
"""
    )


def test_a_configuration_is_printed_with_what_is_given(capsys, tmp_path):
    (tmp_path / "own.yaml").write_text("count: 4\nkinds: [b]\n")
    text = shown(capsys, "--config", str(tmp_path / "own.yaml"), "--count", "5", "--print_config")
    assert text.startswith(
        "# Settings of prx-post example\n\n# --- example\n# What it is called. (required)\nname: null\n"
    )
    assert yaml.safe_load(text) == {"name": None, "count": 5, "kinds": ["b"], "is_loud": False, "rate": None}
    given = ["--kinds", "a", "b", "--name=007", "--is_loud", "true"]
    values = yaml.safe_load(shown(capsys, *given, "--print_config"))
    assert (values["kinds"], values["name"], values["is_loud"]) == (["a", "b"], "007", True)


def test_a_schema_says_what_a_value_must_be():
    schema = json.loads(render_schema("prx-post example", settings_of([Own])))
    assert schema["additionalProperties"] is False
    assert schema["properties"] == {
        "count": {"description": "How many.", "type": "integer", "exclusiveMinimum": 0, "default": 3},
        "name": {"description": "What it is called.", "anyOf": [{"type": "string"}, {"type": "null"}]},
        "kinds": {
            "description": "Which of them.",
            "type": "array",
            "items": {"type": "string", "enum": ["a", "b"]},
            "default": ["a"],
        },
        "rate": {
            "description": "How fast; null: not at all.",
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}],
            "default": None,
        },
        "is_loud": {"description": "Whether it is loud.", "type": "boolean", "default": False},
        "env": {"type": "object"},
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_config_printed_is_the_same_config(path, capsys, tmp_path):
    kinds = KINDS[path.stem.split("-")[0]]
    with pytest.raises(SystemExit):
        parse(kinds, ["--config", str(path), "--print_config"], "test")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    one, other = (parse(kinds, ["--config", str(file)], "test") for file in (path, tmp_path / "printed.yaml"))
    assert one == other


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_config_satisfies_the_schema(path):
    kinds = KINDS[path.stem.split("-")[0]]
    properties = json.loads(render_schema("test", settings_of(kinds)))["properties"]
    for name, value in yaml.safe_load(path.read_text()).items():
        allowed = properties[name].get("anyOf", [properties[name]])
        assert any(satisfies(value, schema) for schema in allowed), name


def satisfies(value, schema):
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list}
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if schema["type"] == "array":
        return all(satisfies(item, schema["items"]) for item in value)
    return value in schema.get("enum", [value])


@pytest.mark.parametrize("stage", REGISTRY)
def test_help_of_a_stage_is_in_its_groups(stage, capsys):
    with pytest.raises(SystemExit):
        main(["help", stage])
    text = capsys.readouterr().out
    assert text.startswith(f"prx-post {stage}: {REGISTRY[stage].summary}\n")
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:7] == ["model:", "data:", f"{stage}:", "training:", "validation:", "saving:", "processes:"]
    names = {f"--{f.name}" for kind in REGISTRY[stage].configs() for f in dataclasses.fields(kind)}
    assert names == {line.split()[0] for line in text.splitlines() if line.startswith("  --")}


def test_a_misspelt_command_is_recognised(capsys):
    assert main(["sfft"]) == 2
    assert "error: 'sfft' is not a command. Did you mean 'sft'." in capsys.readouterr().err
    assert main(["help"]) == 0
    assert "commands:" in capsys.readouterr().out
