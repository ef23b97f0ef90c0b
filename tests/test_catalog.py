import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taoemb.catalog import Catalog, Item, Items, ItemTemplate, Query, QuerySet, SchemaError
from taoemb.tables import read_table

CHORUS = Path(__file__).parents[2] / "shared" / "data" / "chorus"
ITEMS_CSV = "id,title\n0012,Red mug\ni2,Blue cup\n"
QUERIES_CSV = "id,query\nq1,mug\nq2,cup\n"


def folder(tmp_path, **files):
    """A catalog folder of ``items_csv="..."`` and the like; bytes and tables are written as they are."""
    tmp_path.mkdir(exist_ok=True)
    for name, content in files.items():
        path = tmp_path / name.replace("_", ".")
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return tmp_path


def refusal(tmp_path, **files):
    """The SchemaError of a folder with two good items unless others are given."""
    if not any(name.startswith("items") for name in files):
        files["items_csv"] = ITEMS_CSV
    with pytest.raises(SchemaError) as caught:
        Catalog.load(folder(tmp_path, **files))
    return caught.value


def items_table(**columns):
    return pa.table({"id": pa.array(["a", "b"]), "title": pa.array(["mug", "cup"]), **columns})


# What is refused ----------------------------------------------------------------------------------------------------

BAD_ITEMS = {
    "duplicate id": ("id,title\na,x\nb,y\na,z\n", 3, "id", "'a' is already the id of row 1"),
    "empty id": ("id,title\na,x\n,y\n", 2, "id", "empty"),
    "empty title": ("id,title\na,x\nb,\n", 2, "title", "empty"),
    "blank title": ("id,title\na,x\nb,   \n", 2, "title", "empty"),
    "price nan": ("id,title,price\na,x,1\nb,y,nan\n", 2, "price", "leave the cell empty"),
    "price inf": ("id,title,price\na,x,-inf\nb,y,2\n", 1, "price", "leave the cell empty"),
    "price text": ("id,title,price\na,x,1\nb,y,12 EUR\n", 2, "price", "'12 EUR' is not a number"),
    "extra number nan": ("id,title,quality\na,x,0.5\nb,y,NaN\n", 2, "quality", "leave the cell empty"),
    "broken attributes": ('id,title,attributes\na,x,{}\nb,y,"{""colour"": red}"\n', 2, "attributes", "not JSON"),
    "attributes no object": ("id,title,attributes\na,x,[1]\n", 1, "attributes", "must be a JSON object"),
    "misspelled column": ("id,titel\na,x\n", None, "title", "did you mean 'titel'?"),
    "column twice": ("id,id,title\na,b,x\n", None, "id", "more than once"),
    "ragged": ("id,title\na,x\nb,y,z\n", None, "", "Expected 2 columns, got 3"),
    "no file content": ("", None, "", "empty"),
    "only a header": ("id,title\n", None, "", "no items"),
    "semicolons": ("id;title\na;x\n", None, "id", "['id;title']"),
}


@pytest.mark.parametrize("case", BAD_ITEMS)
def test_bad_item_csv_names_row_and_column(case, tmp_path):
    text, row, column, words = BAD_ITEMS[case]
    error = refusal(tmp_path, items_csv=text)
    assert (error.source, error.row, error.column) == ("items.csv", row, column)
    assert words in str(error)
    assert "items.csv" in str(error)


def test_csv_in_another_encoding_names_row(tmp_path):
    error = refusal(tmp_path, items_csv="id,title\na,mug\nb,Tasse für Tee\n".encode("latin-1"))
    assert error.row == 2
    assert "UTF-8" in str(error)


def test_bad_queries(tmp_path):
    twice = refusal(tmp_path, queries_csv="id,query\nq1,mug\nq1,cup\n")
    assert (twice.source, twice.row, twice.column) == ("queries.csv", 2, "id")
    split = refusal(tmp_path, queries_csv="id,query,split\nq1,mug,train\nq2,cup,dev\n")
    assert (split.row, split.column) == (2, "split")
    assert "validation" in str(split)
    negative = refusal(tmp_path, queries_csv="id,query,frequency\nq1,mug,-1\n")
    assert (negative.row, negative.column) == (1, "frequency")
    intent = refusal(tmp_path, queries_csv="id,query,intent\nq1,mug,nothing\n")
    assert (intent.row, intent.column) == (1, "intent")
    empty = refusal(tmp_path, queries_csv='id,query\nq1,mug\nq2," "\n')
    assert (empty.row, empty.column) == (2, "query")


@pytest.mark.parametrize("table", ["qrels", "clicks"])
def test_unknown_ids_are_named(table, tmp_path):
    head = {"qrels": "query_id,item_id,grade", "clicks": "query_id,item_id,clicks"}[table]
    files = {"queries_csv": QUERIES_CSV, f"{table}_csv": f"{head}\nq1,i2,1\nq1,12,1\n"}
    error = refusal(tmp_path, **files)
    assert (error.source, error.row, error.column) == (f"{table}.csv", 2, "item_id")
    assert "'12'" in str(error)  # the catalog has 0012
    files[f"{table}_csv"] = f"{head}\nq9,i2,1\n"
    error = refusal(tmp_path, **files)
    assert (error.row, error.column) == (1, "query_id")


@pytest.mark.parametrize(("cell", "words"), [("4", "0, 1, 2 or 3"), ("-1", "0, 1, 2 or 3"), ("", "0, 1, 2 or 3"),
                                             ("1.5", "whole number"), ("good", "whole number")])  # fmt: skip
def test_bad_grade(cell, words, tmp_path):
    error = refusal(tmp_path, queries_csv=QUERIES_CSV, qrels_csv=f"query_id,item_id,grade\nq1,i2,3\nq2,i2,{cell}\n")
    assert (error.row, error.column) == (2, "grade")
    assert words in str(error)


def test_float_grades_in_parquet_must_be_whole(tmp_path):
    pair = {"query_id": ["q1", "q2"], "item_id": ["i2", "i2"]}
    error = refusal(tmp_path, queries_csv=QUERIES_CSV, qrels_parquet=pa.table({**pair, "grade": [3.0, 1.5]}))
    assert (error.row, error.column) == (2, "grade")
    good = folder(tmp_path, qrels_parquet=pa.table({**pair, "grade": [3.0, 1.0]}))
    assert Catalog.load(good).qrels == {"q1": {"i2": 3}, "q2": {"i2": 1}}


def test_conflicting_duplicate_grade(tmp_path):
    rows = "query_id,item_id,grade\nq1,i2,3\nq1,0012,0\nq1,i2,{}\n"
    error = refusal(tmp_path, queries_csv=QUERIES_CSV, qrels_csv=rows.format(1))
    assert (error.row, error.column) == (3, "grade")
    assert "already has grade 3, not 1" in str(error)
    same = Catalog.load(folder(tmp_path, qrels_csv=rows.format(3)))
    assert same.qrels == {"q1": {"i2": 3, "0012": 0}}


def test_two_files_for_one_table(tmp_path):
    error = refusal(tmp_path, items_csv=ITEMS_CSV, items_jsonl='{"id": "a", "title": "x"}\n')
    assert "items.jsonl" in str(error)
    assert "items.csv" in str(error)


def test_missing_folder_and_missing_items(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Catalog.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"items\.parquet, items\.jsonl or items\.csv"):
        Catalog.load(tmp_path)


def test_corrupt_parquet(tmp_path):
    folder(tmp_path, items_parquet=items_table())
    path = tmp_path / "items.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SchemaError, match=r"items\.parquet: is not a readable parquet file"):
        Catalog.load(tmp_path)


@pytest.mark.parametrize(("values", "row"), [([float("nan"), 1.0], 1), ([1.0, float("inf")], 2)])
def test_parquet_nan_and_inf_are_not_missing_values(values, row, tmp_path):
    error = refusal(tmp_path, items_parquet=items_table(price=pa.array(values)))
    assert (error.row, error.column) == (row, "price")
    assert Catalog.load(folder(tmp_path, items_parquet=items_table(price=pa.array([None, 1.0])))).items[0].price is None


def test_parquet_float_ids_are_refused(tmp_path):
    error = refusal(tmp_path, items_parquet=pa.table({"id": [1.0, 2.0], "title": ["x", "y"]}))
    assert error.column == "id"
    assert "store it as text" in str(error)


@pytest.mark.parametrize(
    ("line", "row", "column", "words"),
    [
        ('{"id": "b", "title": ', 2, "", "not JSON"),
        ('["b", "cup"]', 2, "", "must be a JSON object"),
        ('{"id": 2.0, "title": "cup"}', 2, "id", "float"),
        ('{"id": "b"}', 2, "title", "empty"),
        ('{"id": "b", "title": "cup", "price": "cheap"}', 2, "price", "'cheap'"),
        ('{"id": "b", "title": "cup", "price": NaN}', 2, "price", "leave the cell empty"),
        ('{"id": "b", "title": "cup", "attributes": ["red"]}', 2, "attributes", "must be a JSON object"),
        ('{"id": "b", "title": "\\ud83d"}', 2, "title", "surrogate"),
    ],
)
def test_bad_jsonl_line(line, row, column, words, tmp_path):
    error = refusal(tmp_path, items_jsonl=f'{{"id": "a", "title": "mug", "price": 1.5}}\n{line}\n')
    assert (error.source, error.row, error.column) == ("items.jsonl", row, column)
    assert words in str(error)


def test_empty_jsonl(tmp_path):
    assert "empty" in str(refusal(tmp_path, items_jsonl="\n"))


def test_jsonl_in_another_encoding_names_line(tmp_path):
    error = refusal(tmp_path, items_jsonl=b'{"id": "a", "title": "mug"}\n{"id": "b", "title": "Stra\xdfe"}\n')
    assert error.row == 2
    assert "UTF-8" in str(error)


def test_broken_metadata(tmp_path):
    assert "catalog.json" in str(refusal(tmp_path, catalog_json="{name: shop}"))
    assert "unjudged" in str(refusal(tmp_path, catalog_json='{"unjudged": "none"}'))


@pytest.mark.parametrize("attributes", [[["red"], ["big"]], [[{"name": "colour", "value": "red"}], []]])
def test_lists_are_no_attributes(attributes, tmp_path):
    error = refusal(tmp_path, items_parquet=items_table(attributes=pa.array(attributes)))
    assert error.column == "attributes"
    assert "JSON, struct or map" in str(error)


def test_unreadable_suffix(tmp_path):
    with pytest.raises(SchemaError, match=r"use \.parquet, \.jsonl or \.csv"):
        QuerySet.load(tmp_path / "queries.xlsx")


# What is read -------------------------------------------------------------------------------------------------------


def test_ids_stay_text(tmp_path):
    assert Catalog.load(folder(tmp_path / "csv", items_csv=ITEMS_CSV)).items.ids == ["0012", "i2"]
    lines = '{"id": "0012", "title": "x"}\n\n{"id": 12345678901234567, "title": "y"}\n'
    assert Catalog.load(folder(tmp_path / "jsonl", items_jsonl=lines)).items.ids == ["0012", "12345678901234567"]
    whole = pa.table({"id": pa.array([12, 2**60 + 1]), "title": ["x", "y"]})
    assert Catalog.load(folder(tmp_path / "parquet", items_parquet=whole)).items.ids == ["12", str(2**60 + 1)]


def test_csv_details(tmp_path):
    text = (
        '\ufeffid,title,description,price,quality,note\r\na,"Mug, ""red""","two\nlines", 9.50 ,,x\r\nb,Cup,,,0.5,7\r\n'
    )
    items = Catalog.load(folder(tmp_path, items_csv=text)).items
    assert items[0] == Item("a", 'Mug, "red"', description="two\nlines", price=9.5)
    assert items[1] == Item("b", "Cup")
    np.testing.assert_array_equal(items.column("price"), [9.5, np.nan])
    np.testing.assert_array_equal(items.column("quality"), [np.nan, 0.5])
    assert items.column("note") is None  # text that the schema does not know is left out


def test_attributes_as_text_struct_and_map(tmp_path):
    wanted = [{"colour": "red", "size": "3", "new": "true"}, {}]
    objects = [{"colour": "red", "size": 3, "new": True}, None]
    as_map = pa.array([[("colour", "red"), ("size", "3"), ("new", "true")], None], pa.map_(pa.string(), pa.string()))
    given_as = {
        "text": pa.array([json.dumps(objects[0]), ""]),
        "struct": pa.array(objects),
        "map": as_map,
    }
    for name, attributes in given_as.items():
        catalog = Catalog.load(folder(tmp_path / name, items_parquet=items_table(attributes=attributes)))
        assert [dict(item.attributes) for item in catalog.items] == wanted, name
    lines = "".join(json.dumps({"id": str(i), "title": "x", "attributes": o}) + "\n" for i, o in enumerate(objects))
    catalog = Catalog.load(folder(tmp_path / "jsonl", items_jsonl=lines))
    assert [dict(item.attributes) for item in catalog.items] == wanted


def test_attribute_values_become_text():
    raw = {"a": 1.0, "b": 1.5, "c": False, "d": None, "e": [1, "x"], "f": "é"}
    items = Items(pa.table({"id": ["1"], "title": ["t"], "attributes": [json.dumps(raw)]}))
    assert items.attributes(0) == {"a": "1", "b": "1.5", "c": "false", "e": '[1, "x"]', "f": "é"}


def test_unicode_survives(tmp_path):
    title, item_id = "Čaj 緑茶 🍵 e\u0301 \u202eabc", "ключ/1 🍵"
    line = json.dumps({"id": item_id, "title": title, "attributes": {"größe": "½ l"}}, ensure_ascii=False)
    catalog = Catalog.load(folder(tmp_path / "in", items_jsonl=line))
    catalog.save(tmp_path / "out")
    item = Catalog.load(tmp_path / "out").items[0]
    assert (item.id, item.title, dict(item.attributes)) == (item_id, title, {"größe": "½ l"})


def test_items_are_a_sequence(small_shop):
    items = small_shop.items
    assert len(items) == 600
    assert items[-1] == items[599]
    assert [item.id for item in items[10:13]] == items.ids[10:13]
    assert next(iter(items)) == items[0]
    with pytest.raises(IndexError):
        items[600]
    np.testing.assert_array_equal(items.positions([items.ids[7], items.ids[3], items.ids[7]]), [7, 3, 7])
    assert items.positions([]).dtype == np.int64
    with pytest.raises(KeyError, match="'nothing' is not in the catalog of 600 items"):
        items.positions(["nothing"])
    with pytest.raises(TypeError, match="'title' holds string"):
        items.column("title")


def test_query_selection(small_shop):
    queries = small_shop.queries
    assert {split: len(queries.select(split)) for split in ("train", "validation", "test")} == {
        "train": 120,
        "validation": 20,
        "test": 30,
    }
    wanted = [queries.ids[5], queries.ids[2]]
    assert queries.select(ids=wanted).ids == [queries.ids[2], queries.ids[5]]  # file order
    assert queries[3:5].texts == queries.texts[3:5]
    with pytest.raises(ValueError, match=f"query id '{queries.ids[0]}' is already in the catalog"):
        small_shop.with_queries(QuerySet([Query(queries.ids[0], "x")]))
    assert len(small_shop.with_queries(QuerySet([Query("new", "x")])).queries) == 171
    assert len(small_shop.queries) == 170


# Round trips --------------------------------------------------------------------------------------------------------


def same(a, b):
    assert list(a.items) == list(b.items)
    assert a.items.table.column_names == b.items.table.column_names
    for name in set(a.items.table.column_names) - set(Item.__slots__):
        np.testing.assert_array_equal(a.items.column(name), b.items.column(name))
    assert a.queries.to_table() == b.queries.to_table()
    assert list(a.queries) == list(b.queries)
    assert a.qrels == b.qrels
    assert (a.clicks is None) == (b.clicks is None)
    assert a.clicks is None or a.clicks == b.clicks
    assert a.metadata == b.metadata


def test_saves_and_loads_the_same(small_shop, small_shop_folder, tmp_path):
    loaded = Catalog.load(small_shop_folder)
    same(small_shop, loaded)
    assert loaded.unjudged == 0
    loaded.save(tmp_path / "again")
    loaded.save(tmp_path / "again")  # in its own place
    same(loaded, Catalog.load(tmp_path / "again"))
    assert not list((tmp_path / "again").glob("*.tmp"))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_jsonl_and_csv_give_what_parquet_gives(kind, small_shop, small_shop_folder, tmp_path):
    for name in ("items", "queries", "qrels", "clicks"):
        table = pq.read_table(small_shop_folder / f"{name}.parquet")
        if kind == "csv":
            pa_csv.write_csv(table, tmp_path / f"{name}.csv")
        else:
            lines = (json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in table.to_pylist())
            (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "catalog.json").write_bytes((small_shop_folder / "catalog.json").read_bytes())
    loaded = Catalog.load(tmp_path)
    assert list(loaded.items) == list(small_shop.items)
    assert list(loaded.queries) == list(small_shop.queries)
    assert loaded.qrels == small_shop.qrels
    assert loaded.clicks is not None
    assert small_shop.clicks is not None
    assert loaded.clicks.to_pylist() == small_shop.clicks.to_pylist()
    for name in ("quality", "rating", "sales", "return_rate"):
        np.testing.assert_array_equal(loaded.items.column(name), small_shop.items.column(name))
    loaded.save(tmp_path / "out")
    same(loaded, Catalog.load(tmp_path / "out"))


def test_saving_never_mixes_with_other_tables(small_shop, tmp_path):
    source = folder(tmp_path / "csv", items_csv=ITEMS_CSV)
    catalog = Catalog.load(source)
    with pytest.raises(FileExistsError, match=r"items\.csv"):
        catalog.save(source)
    assert sorted(path.name for path in source.iterdir()) == ["items.csv"]
    small_shop.save(tmp_path / "shop")
    with pytest.raises(FileExistsError, match=r"queries\.parquet"):
        catalog.save(tmp_path / "shop")
    same(small_shop, Catalog.load(tmp_path / "shop"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the import of datasets
def test_from_datasets(small_shop):
    datasets = pytest.importorskip("datasets")
    items = datasets.Dataset.from_dict(
        {
            "id": ["1", "2"],
            "title": ["mug", "cup"],
            "attributes": [{"colour": "red"}, {"colour": None}],
            "quality": [1, 0],
        }
    )
    queries = datasets.Dataset.from_dict({"id": ["q"], "query": ["red mug"], "split": ["test"]})
    qrels = datasets.Dataset.from_dict({"query_id": ["q", "q"], "item_id": ["1", "2"], "grade": [3, 0]})
    catalog = Catalog.from_datasets(items, queries, qrels)
    assert list(catalog.items) == [Item("1", "mug", attributes={"colour": "red"}), Item("2", "cup")]
    assert list(catalog.queries) == [Query("q", "red mug", "test")]
    assert catalog.qrels == {"q": {"1": 3, "2": 0}}
    np.testing.assert_array_equal(catalog.items.column("quality"), [1, 0])
    whole = Catalog.from_datasets(datasets.Dataset(small_shop.items.table))
    assert list(whole.items) == list(small_shop.items)
    selected = Catalog.from_datasets(items.select([1]))  # indices beside the table
    assert selected.items.ids == ["2"]
    with pytest.raises(SchemaError, match="items, column 'title'"):
        Catalog.from_datasets(items.rename_column("title", "name"))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
some_text = text.filter(str.strip)
item = st.builds(
    Item, id=text.filter(bool), title=some_text, description=text, category=text, brand=text,
    attributes=st.dictionaries(text, text, max_size=3),
    price=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@settings(max_examples=50)
@given(items=st.lists(item, min_size=1, max_size=4, unique_by=lambda i: i.id))
def test_any_items_survive_parquet_and_jsonl(items, tmp_path_factory):
    rows = [{**{name: getattr(i, name) for name in Item.__slots__}, "attributes": dict(i.attributes)} for i in items]
    lines = "".join(json.dumps({"id": "x", **row}) + "\n" for row in rows)
    catalog = Catalog.load(folder(tmp_path_factory.mktemp("h"), items_jsonl=lines))
    assert list(catalog.items) == items
    out = tmp_path_factory.mktemp("h")
    catalog.save(out)
    assert list(Catalog.load(out).items) == items


# Item template ------------------------------------------------------------------------------------------------------

MUG = Item(
    "1", "Acme  mug\n red", description="Holds tea.", category="Kitchen > Mugs", brand="ACME",
    attributes={"colour": "red", "handle": "true", "pieces": "2", "size": "330  ml", "material": "clay"}, price=9.0,
)  # fmt: skip


def test_template_order_and_content():
    assert ItemTemplate().render(MUG) == (
        "Acme mug red | Kitchen > Mugs | Holds tea. | colour: red, size: 330 ml, material: clay"
    )
    assert ItemTemplate(fields=("description", "title")).render(MUG) == "Holds tea. | Acme mug red"
    chosen = ItemTemplate(attributes=("size", "handle", "weight", "colour"), fields=("title", "attributes"))
    assert chosen.render(MUG) == "Acme mug red | size: 330 ml, handle: true, colour: red"
    assert ItemTemplate(fields=("title", "attributes"), max_attributes=1).render(MUG) == "Acme mug red | colour: red"
    assert ItemTemplate(fields=("title", "attributes"), max_attributes=0).render(MUG) == "Acme mug red"
    assert ItemTemplate().render(Item("1", "mug")) == "mug"


def test_template_repeats_no_brand_or_category():
    brand = ItemTemplate(fields=("title", "brand", "category"))
    assert brand.render(Item("1", "Mug", brand="Acme", category="mug")) == "Mug | Acme"
    assert brand.render(Item("1", "Mug", brand="Acme", category="acme")) == "Mug | Acme"


@pytest.mark.parametrize("limit", [1, 5, 13, 20, 40, 86, 1000])
def test_template_cuts_at_a_word(limit):
    whole, cut = ItemTemplate(max_chars=10_000).render(MUG), ItemTemplate(max_chars=limit).render(MUG)
    assert len(cut) <= limit
    assert whole.startswith(cut)
    if cut != whole and " " in whole[: limit + 1]:
        assert whole[len(cut)] == " "
        assert len(cut) + 1 + len(whole[len(cut) + 1 :].split(" ")[0]) > limit  # one more word would not fit


@pytest.mark.parametrize("wrong", [{"fields": ("title", "colour")}, {"fields": ("brand",)}, {"max_chars": 0}])
def test_template_refuses(wrong):
    with pytest.raises(ValueError, match=r"must be|use some of"):
        ItemTemplate(**wrong)


# Real data ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CHORUS.is_dir(), reason="the Chorus data (not part of the project) are not beside the checkout")
def test_chorus_loads():
    catalog = Catalog.load(CHORUS)
    assert len(catalog.items) == len(read_table(CHORUS / "items.parquet", None))  # type: ignore[arg-type]
    assert len(catalog.items) > 10_000
    assert len(catalog.queries) > 50
    assert sum(map(len, catalog.qrels.values())) > 1000
    assert {g for graded in catalog.qrels.values() for g in graded.values()} <= {0, 1, 2, 3}
    assert any(item.attributes for item in catalog.items[:100])
    texts = ItemTemplate().texts(catalog.items[:2000])
    assert all(0 < len(text) <= 400 for text in texts)


def test_queries_of_a_folder(small_shop, tmp_path):
    small_shop.save(tmp_path / "with")
    Catalog(small_shop.items).save(tmp_path / "without")
    assert QuerySet.load(tmp_path / "with").texts == small_shop.queries.texts
    assert len(QuerySet.load(tmp_path / "without")) == 0
