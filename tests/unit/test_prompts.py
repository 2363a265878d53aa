import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prx_post.base.errors import PrxPostError
from prx_post.data.prompts import read_prompt_rows
from prx_post.generate import GenerateConfig, read_prompts
from prx_post.recipes.prompts import PromptListConfig, run


def generated(path):
    config = GenerateConfig(model_name_or_path="tiny", output_dir="x", prompts_file=str(path))
    return read_prompts(config)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "\ufeffa red cube\n\n  {not json}  \n", ["a red cube", "{not json}"]),
        ("p.jsonl", '{"prompt": "a", "target": "1"}\n\n{"prompt": "b"}\n', ["a", "b"]),
        ("p.json", '["a", {"prompt": "b"}]', ["a", "b"]),
        ("p.csv", 'prompt,target\r\n007,7\r\n\r\n"a red, round cube",\r\n,8\r\n', ["007", "a red, round cube"]),
        ("p.tsv", "id\ttext\n1\tNone\n", ["None"]),
    ],
)
def test_generate_reads_text_json_lines_and_json(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert generated(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "café".encode("latin-1"), "line 1 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', 'line 2 is no prompt, but must be JSON such as {"prompt"'),
        ("p.json", b'["a", 3]', "entry 2 is no prompt"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}', "line 1 holds half of a character"),
        ("p.json", b'["a", ', "is not valid JSON: Expecting value: line 1"),
        ("p.csv", b"a red cube\na blue ball\n", "has the columns a red cube, none of which is called prompt, text"),
        ("p.csv", b"prompt\na, b\n", "line 2 has 2 cells, but must have 1"),
        ("p.json", b'{"prompt": "a"}', 'must be a list such as \\["a red cube"'),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_one_clear_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PrxPostError, match=message):
        generated(tmp_path / name)


def write_source(folder, kind):
    path = folder / f"source.{kind}"
    texts = ["a  red\tcube", "007", "a red cube", "", "None"]
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        path.write_text(f"text{mark}group\n" + "".join(f'"{t}"{mark}{i}\n' for i, t in enumerate(texts)))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "group": str(i)}) + "\n" for i, t in enumerate(texts)))
    elif kind == "json":
        path.write_text(json.dumps([{"prompt": t, "group": str(i)} for i, t in enumerate(texts)]))
    else:
        pq.write_table(pa.table({"text": texts, "group": [str(i) for i in range(5)]}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "json", "jsonl", "parquet"])
def test_prompts_of_any_format_are_listed_once_as_they_are_spelt(tmp_path, kind, capsys):
    output = tmp_path / "out" / "prompts.jsonl"
    keep = [] if kind == "txt" else ["group"]
    source = write_source(tmp_path, kind)
    run(PromptListConfig(source=str(source), prompt_column="text", keep_columns=keep, output_file=str(output)))
    expected = [
        {"prompt": "a red cube", "group": "0"},
        {"prompt": "007", "group": "1"},
        {"prompt": "None", "group": "4"},
    ]
    rows = read_prompt_rows(output)
    assert rows == (expected if keep else [{"prompt": row["prompt"]} for row in expected])
    empty = 0 if kind == "txt" else 1  # a blank line of text is none
    assert f"of {4 + empty} rows; {empty} were empty, 1 repeated" in capsys.readouterr().out
    assert generated(output) == ["a red cube", "007", "None"]


def test_dates_are_kept_as_text(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "when": [datetime(2026, 1, 2)]}), tmp_path / "s.parquet")
    output = tmp_path / "p.jsonl"
    run(PromptListConfig(source=str(tmp_path / "s.parquet"), keep_columns=["when"], output_file=str(output)))
    assert read_prompt_rows(output)[0]["when"].startswith("2026-01-02")


def test_a_list_that_is_there_is_replaced_only_when_asked(tmp_path):
    source = write_source(tmp_path, "txt")
    output = tmp_path / "p.jsonl"
    output.write_text("precious")
    with pytest.raises(PrxPostError, match="is there already"):
        run(PromptListConfig(source=str(source), output_file=str(output)))
    assert output.read_text() == "precious"
    run(PromptListConfig(source=str(source), output_file=str(output), overwrite=True, max_prompts=1))
    assert generated(output) == ["a red cube"]


def test_mistakes_in_the_source_are_named(tmp_path):
    common = {"output_file": str(tmp_path / "p.jsonl")}
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(PrxPostError, match="holds no prompt"):
        run(PromptListConfig(source=str(tmp_path / "empty.txt"), **common))
    with pytest.raises(PrxPostError, match="column 'prompt' is not in .*source.csv, which has text, group"):
        run(PromptListConfig(source=str(write_source(tmp_path, "csv")), **common))
    with pytest.raises(PrxPostError, match="must end in .jsonl"):
        run(PromptListConfig(source="x.txt", output_file="prompts.txt"))
    (tmp_path / "latin.csv").write_bytes("prompt\ncafé\n".encode("latin-1"))
    with pytest.raises(PrxPostError, match="latin.csv, line 2 is not UTF-8"):
        run(PromptListConfig(source=str(tmp_path / "latin.csv"), **common))
    (tmp_path / "source.xml").write_text("<x/>")
    with pytest.raises(PrxPostError, match="must be one of .parquet, .json, .jsonl, .csv, .tsv"):
        run(PromptListConfig(source=str(tmp_path / "source.xml"), **common))


def test_a_column_becomes_the_group_and_a_prompt_is_kept_once_in_each(tmp_path, capsys):
    source = tmp_path / "source.csv"
    source.write_text("text,kind,hard\na cat,animals,no\na cat,pets,yes\na cat,animals,yes\na house, ,no\n")
    output = tmp_path / "p.jsonl"
    common = {"source": str(source), "prompt_column": "text", "output_file": str(output), "overwrite": True}
    run(PromptListConfig(**common, group_column="kind", keep_columns=["hard"]))
    assert read_prompt_rows(output) == [
        {"prompt": "a cat", "hard": "no", "group": "animals"},
        {"prompt": "a cat", "hard": "yes", "group": "pets"},
        {"prompt": "a house", "hard": "no"},  # eval puts what has no group under "all"
    ]
    assert "of 4 rows; 0 were empty, 1 repeated" in capsys.readouterr().out
    run(PromptListConfig(**common, group_column="kind", keep_columns=["kind"]))
    assert read_prompt_rows(output)[1] == {"prompt": "a cat", "kind": "pets", "group": "pets"}


def test_groups_of_json_entries_must_be_there(tmp_path):
    (tmp_path / "s.json").write_text('[{"prompt": "a", "kind": 7}, {"prompt": "b"}]')
    common = {"source": str(tmp_path / "s.json"), "output_file": str(tmp_path / "p.jsonl")}
    with pytest.raises(PrxPostError, match="prompt 2 has no 'kind'. Leave it out of group_column"):
        run(PromptListConfig(**common, group_column="kind"))
    (tmp_path / "s.json").write_text('[{"prompt": "a", "kind": 7}]')
    run(PromptListConfig(**common, group_column="kind"))
    assert read_prompt_rows(tmp_path / "p.jsonl") == [{"prompt": "a", "group": "7"}]


def test_several_files_are_a_group_each(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/concept-art.json").write_text('["a  tower", "a dragon", "a dragon"]')
    (tmp_path / "in/photo.txt").write_text("a dragon\n")
    (tmp_path / "in/other.txt").write_text("not asked for\n")
    common = {"source": str(tmp_path / "in"), "output_file": str(tmp_path / "p.jsonl")}
    run(PromptListConfig(**common, source_files=["concept-art.json", "photo.txt"]))
    assert read_prompt_rows(tmp_path / "p.jsonl") == [
        {"prompt": "a tower", "group": "concept-art"},
        {"prompt": "a dragon", "group": "concept-art"},
        {"prompt": "a dragon", "group": "photo"},
    ]
    with pytest.raises(PrxPostError, match=r"source_files has 'paintings.json', which is not in .*in. Check source"):
        run(PromptListConfig(**common, source_files=["photo.txt", "paintings.json"], overwrite=True))


def test_a_group_has_one_origin():
    common = {"source": "x", "output_file": "p.jsonl"}
    with pytest.raises(PrxPostError, match="group_column is 'kind', but must be null"):
        PromptListConfig(**common, group_column="kind", source_files=["a.txt"])
    for setting in ({"group_column": "kind"}, {"source_files": ["a.txt"]}):
        with pytest.raises(PrxPostError, match="keep_columns is \\['group'\\], but must be without group"):
            PromptListConfig(**common, **setting, keep_columns=["group"])
