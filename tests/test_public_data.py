"""Samples in the published formats, written here, and what becomes of them."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from taoemb.catalog import Catalog, SchemaError
from taoemb.cli import app
from taoemb.public_data import READERS, read_beir, read_esci, read_homedepot, read_wands

EXAMPLES = """example_id,query,query_id,product_id,product_locale,esci_label,small_version,large_version,split
0,#1 mug – größe,10,B001,us,E,1,1,train
1,#1 mug – größe,10,B002,us,S,1,1,train
2,#1 mug – größe,10,B003,us,C,1,1,train
3,red cup,11,B001,us,I,1,1,test
4,red cup,11,B004,us,E,1,1,test
5,easy query,12,B002,us,E,0,1,train
6,taza roja,13,B001,es,E,1,1,test
"""
PRODUCTS = [  # id, title, description, bullet points, brand, colour, locale
    ("B001", "Mug “Größe”", "<p>Holds tea.</p>", "Big\nRound", "Acme", 'Red "matte"', "us"),
    ("B002", "Bowl", None, None, None, None, "us"),
    ("B003", None, "A lid without a title", None, "Acme", "Red", "us"),
    ("B004", "", None, "", "", "", "us"),
    ("B009", "Never judged", None, None, None, None, "us"),
    ("B001", "Taza", None, None, None, None, "es"),
]
PRODUCT_COLUMNS = (
    "product_id", "product_title", "product_description", "product_bullet_point", "product_brand", "product_color",
    "product_locale",
)  # fmt: skip


def esci(folder, examples=EXAMPLES, products=PRODUCTS, columns=PRODUCT_COLUMNS):
    """The two parquet files, with the types of the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(io.StringIO(examples)))
    numbers = ("example_id", "query_id", "small_version", "large_version")
    table = {name: [int(r[name]) if name in numbers else r[name] for r in rows] for name in rows[0]}
    pq.write_table(pa.table(table), folder / "shopping_queries_dataset_examples.parquet", row_group_size=2)
    table = {name: pa.array([p[i] for p in products], pa.string()) for i, name in enumerate(columns)}
    pq.write_table(pa.table(table), folder / "shopping_queries_dataset_products.parquet", row_group_size=2)
    return folder


WANDS = {
    "product.csv": (
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features\t"
        "rating_count\taverage_rating\treview_count\n"
        "0\tsolid wood platform bed\tBeds\tFurniture / Bedroom Furniture / Beds\tgood , deep sleep\t"
        "overallwidth-sidetoside:64.7|color : brown|color : oak|color : oak| : gray wood|loose\t15.0\t4.5\t15.0\n"
        "1\tslow cooker 7 qt . 14 ''\tSlow Cookers|Pots\t\t\t\t7.0\t\t\n"
        '2\t"12"" décor plate"\t\t\t"first line\nsecond line"\tcolor:red\t1.0\t1.0\t1.0\n'
    ),
    "query.csv": "query_id\tquery\tquery_class\n0\tsalon chair\tMassage Chairs\n3\tdécor\t\n",
    "label.csv": (
        "id\tquery_id\tproduct_id\tlabel\n0\t0\t0\tExact\n1\t0\t1\tPartial\n2\t0\t2\tIrrelevant\n3\t3\t2\tExact\n"
        "4\t3\t2\tPartial\n5\t3\t0\tIrrelevant\n6\t3\t0\tIrrelevant\n"
    ),
}
HOMEDEPOT = {
    "train.csv": (
        '"id","product_uid","product_title","search_term","relevance"\n'
        '2,100001,"Simpson 12-Gauge Angle","angle bracket",3\n'
        '3,100001,"Simpson 12-Gauge Angle","l bracket",2.5\n'
        '9,100002,"BEHR 1 gal. Deck-Over","deck over",2.67\n'
        '16,100005,"Delta Vero 45° ""Chrome""","angle bracket",1.33\n'
        '17,100002,"BEHR 1 gal. Deck-Over","angle bracket",2\n'
        '18,100002,"BEHR 1 gal. Deck-Over","angle bracket",1\n'
    ),
    "product_descriptions.csv": (
        '"product_uid","product_description"\n100001,"Not only do angles make joints stronger, 45° too"\n'
        '100002,"Deck paint"\n100003,"Neither in train nor in test"\n'
    ),
    "attributes.csv": (
        '"product_uid","name","value"\n100001,"Bullet01","Versatile"\n100001,"MFG Brand Name","Simpson"\n'
        '100001,"Bullet02","Strong"\n100001,"Material","Galvanized Steel"\n,,\n100002,"Color",\n'
    ),
    "test.csv": '"id","product_uid","product_title","search_term"\n1,100006,"Only in test ½ in.","90 degree"\n',
}
BEIR = {
    "corpus.jsonl": (
        '{"_id": "d1", "title": "Tea", "text": "Leaves in water", "metadata": {"url": "x"}}\n'
        '{"_id": "d2", "title": "", "text": "Kaffee – schön heiß"}\n{"_id": "d3", "title": "", "text": ""}\n'
    ),
    "queries.jsonl": (
        '{"_id": "q1", "text": "tea", "metadata": {}}\n{"_id": "q2", "text": "coffee"}\n'
        '{"_id": "q3", "text": "milk"}\n{"_id": "q4", "text": "no grades"}\n'
    ),
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
    "qrels/dev.tsv": "query-id\tcorpus-id\tscore\nq2\td2\t1\nq2\td1\t0\n",
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq3\td3\t1\n",
}


def write(folder, files, encoding="utf-8", **changed):
    """The files of a set; ``changed`` ones by their name up to the dot, None for none."""
    for name, text in files.items():
        text = changed.get(name.split(".")[0].replace("/", "_"), text)
        if text is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(encoding))
    return folder


def homedepot(folder, **changed):
    return write(folder, HOMEDEPOT, "latin-1", **changed)


def splits(catalog):
    return {query.text: query.split for query in catalog.queries}


# Amazon ESCI ------------------------------------------------------------------------------------------------------------


def test_esci(tmp_path):
    catalog = read_esci(esci(tmp_path))
    assert catalog.items.ids == ["B001", "B002", "B003", "B004", "B009"]  # the full corpus of the locale
    assert catalog.qrels == {"10": {"B001": 3, "B002": 2, "B003": 1}, "11": {"B001": 0, "B004": 3}}
    assert splits(catalog) == {"#1 mug – größe": "train", "red cup": "test"}
    assert catalog.queries.ids == ["10", "11"]
    assert catalog.unjudged is None
    mug, bowl, lid, nameless, _ = catalog.items
    assert (mug.title, mug.brand, mug.attributes) == ("Mug “Größe”", "Acme", {"color": 'Red "matte"'})
    assert mug.description == "Big\nRound\n<p>Holds tea.</p>"
    assert (bowl.description, bowl.brand, bowl.attributes) == ("", "", {})
    assert (lid.title, lid.description) == ("A lid without a title", "")
    assert nameless.title == "B004"


def test_esci_versions_and_locales(tmp_path):
    esci(tmp_path)
    large = read_esci(tmp_path, version="large")
    assert large.queries.ids == ["10", "11", "12"]
    assert large.qrels["12"] == {"B002": 3}
    assert len(large.items) == 5
    spanish = read_esci(tmp_path, "es")
    assert (spanish.items[0].title, spanish.qrels) == ("Taza", {"13": {"B001": 3}})
    with pytest.raises(ValueError, match="locale='jp': .* has us, es"):
        read_esci(tmp_path, "jp")
    with pytest.raises(ValueError, match="small or large"):
        read_esci(tmp_path, version="medium")


def test_esci_files_as_other_writers_store_them(tmp_path):
    """Dictionaries, as pandas writes categories, and large strings."""
    expected = read_esci(esci(tmp_path))
    for name in ("examples", "products"):
        file = tmp_path / f"shopping_queries_dataset_{name}.parquet"
        table = pq.read_table(file)
        for i, column in enumerate(table.column_names):
            if column in ("product_locale", "split", "esci_label", "product_brand"):
                table = table.set_column(i, column, table[column].dictionary_encode())
            elif pa.types.is_string(table[column].type):
                table = table.set_column(i, column, table[column].cast(pa.large_string()))
        pq.write_table(table, file)
    found = read_esci(tmp_path)
    assert found.items.table == expected.items.table
    assert found.qrels == expected.qrels


def test_esci_columns_in_another_order(tmp_path):
    expected = read_esci(esci(tmp_path))
    for file in tmp_path.iterdir():
        table = pq.read_table(file)
        pq.write_table(table.select(sorted(table.column_names)), file)
    found = read_esci(tmp_path)
    assert (found.items.table, found.qrels) == (expected.items.table, expected.qrels)


@pytest.mark.parametrize(("old", "new", "row", "column", "words"), [
    ("B003,us,C", "B003,us,X", 3, "esci_label", "'X' is none of E, S, C, I"),
    ("B003,us,C", "B777,us,C", 3, "product_id", "is no product of locale us"),
    ("1,#1 mug – größe,10", "1,another,10", 2, "query", "same query_id"),
    ("B002,us,S,1,1,train", "B002,us,S,1,1,test", 2, "split", "same query_id"),
    ("I,1,1,test", "I,1,1,dev", 4, "split", "none of train, test"),
    ("0,#1 mug – größe,10", "0, ,10", 1, "query", "is empty"),
    ("B002,us,S", "B001,us,S", 2, "esci_label", "same pair"),
])  # fmt: skip
def test_esci_refuses(tmp_path, old, new, row, column, words):
    assert old in EXAMPLES
    with pytest.raises(SchemaError) as caught:
        read_esci(esci(tmp_path, EXAMPLES.replace(old, new)))
    assert (caught.value.row, caught.value.column) == (row, column)
    assert caught.value.source == "shopping_queries_dataset_examples.parquet"
    assert words in str(caught.value)


def test_esci_refuses_other_products(tmp_path):
    with pytest.raises(
        SchemaError, match=r"products.parquet \(rows of locale us\), row 6, column 'product_id': 'B001' is in an ear"
    ):
        read_esci(esci(tmp_path / "twice", products=[*PRODUCTS, PRODUCTS[0]]))
    renamed = tuple(name.replace("bullet_point", "bullets") for name in PRODUCT_COLUMNS)
    with pytest.raises(SchemaError, match="'product_bullet_point': is missing.*did you mean 'product_bullets'"):
        read_esci(esci(tmp_path / "renamed", columns=renamed))
    esci(tmp_path / "broken")
    (tmp_path / "broken" / "shopping_queries_dataset_products.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SchemaError, match="products.parquet: is not a readable parquet file"):
        read_esci(tmp_path / "broken")
    esci(tmp_path / "empty", products=[])
    with pytest.raises(SchemaError, match="'B001' is no product of locale us"):
        read_esci(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"examples.parquet is not there; give the folder shopping_queries"):
        read_esci(tmp_path)


# WANDS ------------------------------------------------------------------------------------------------------------------


def test_wands(tmp_path):
    catalog = read_wands(write(tmp_path, WANDS))
    assert catalog.qrels == {"0": {"0": 3, "1": 1, "2": 0}, "3": {"2": 1, "0": 0}}  # of two labels the lower one
    assert splits(catalog) == {"salon chair": "test", "décor": "test"}
    assert catalog.unjudged is None
    bed, cooker, plate = catalog.items
    assert bed.category == "Furniture / Bedroom Furniture / Beds"
    assert bed.attributes == {"overallwidth-sidetoside": "64.7", "color": "brown, oak"}
    assert (cooker.title, cooker.category, cooker.attributes) == ("slow cooker 7 qt . 14 ''", "Slow Cookers|Pots", {})
    assert (plate.title, plate.description) == ('12" décor plate', "first line\nsecond line")
    mean = (15 * 4.5 + 1 * 1) / 16
    expected = [(15 * 4.5 + 10 * mean) / 25 / 5, mean / 5, (1 + 10 * mean) / 11 / 5]
    np.testing.assert_allclose(catalog.items.column("quality"), expected)
    np.testing.assert_array_equal(catalog.items.column("rating_count"), [15, 7, 1])
    np.testing.assert_array_equal(catalog.items.column("average_rating"), [4.5, np.nan, 1])


@pytest.mark.parametrize(("file", "old", "new", "row", "column", "words"), [
    ("label.csv", "Partial\n2", "partial\n2", 2, "label", "'partial' is none of Exact, Partial, Irrelevant"),
    ("label.csv", "3\t3\t2", "3\t4\t2", 4, "query_id", "'4' is not in query.csv"),
    ("label.csv", "3\t3\t2", "3\t3\t9", 4, "product_id", "'9' is not in product.csv"),
    ("label.csv", "3\t3\t2", "3\t3\t2\tx", None, "", "Expected 4 columns"),
    ("product.csv", "\n1\tslow", "\n0\tslow", 2, "product_id", "earlier row"),
    ("product.csv", "15.0\t4.5", "15.0\t45", 1, "average_rating", "no rating"),
    ("product.csv", "15.0\t4.5", "many\t4.5", 1, "rating_count", "is not a number"),
    ("product.csv", "category hierarchy", "category", None, "category hierarchy", "is missing"),
    ("query.csv", "décor", " ", 2, "query", "is empty"),
])  # fmt: skip
def test_wands_refuses(tmp_path, file, old, new, row, column, words):
    assert old in WANDS[file]
    with pytest.raises(SchemaError) as caught:
        read_wands(write(tmp_path, {**WANDS, file: WANDS[file].replace(old, new, 1)}))
    assert (caught.value.source, caught.value.row, caught.value.column) == (file, row, column)
    assert words in str(caught.value)


# Home Depot -------------------------------------------------------------------------------------------------------------


def test_homedepot(tmp_path):
    catalog = read_homedepot(homedepot(tmp_path))
    assert catalog.items.ids == ["100001", "100002", "100003", "100005", "100006"]
    texts = dict(zip(catalog.queries.ids, catalog.queries.texts))
    grades = {texts[query]: graded for query, graded in catalog.qrels.items()}
    assert grades == {
        "angle bracket": {"100001": 3, "100005": 0, "100002": 1},  # 100002: mean of 2 and 1
        "l bracket": {"100001": 2},
        "deck over": {"100002": 3},
    }
    angle, paint, untitled, delta, only_test = catalog.items
    assert angle.description == "Not only do angles make joints stronger, 45° too\nVersatile\nStrong"
    assert (angle.brand, angle.attributes) == ("Simpson", {"Material": "Galvanized Steel"})
    assert (paint.brand, paint.attributes) == ("", {})
    assert untitled.title == "Neither in train nor in test"
    assert delta.title == 'Delta Vero 45° "Chrome"'
    assert only_test.title == "Only in test ½ in."
    assert catalog.unjudged is None


def test_homedepot_grades_and_splits(tmp_path):
    relevance = {
        "1": 0,
        "1.33": 0,
        "1.5": 1,
        "1.67": 1,
        "2": 1,
        "2.25": 2,
        "2.33": 2,
        "2.5": 2,
        "2.67": 3,
        "2.75": 3,
        "3": 3,
    }
    queries = [f"query {i}" for i in range(2000)]
    values = [*relevance] * 200
    rows = "".join(f"{i},100001,t,{query},{values[i]}\n" for i, query in enumerate(queries))
    head = "id,product_uid,product_title,search_term,relevance\n"
    catalog = read_homedepot(homedepot(tmp_path / "a", train=head + rows, attributes=None, test=None))
    found = {query.text: catalog.qrels[query.id]["100001"] for query in catalog.queries}
    assert found == {query: relevance[values[i]] for i, query in enumerate(queries)}
    counts = {name: len(catalog.queries.select(name)) for name in ("train", "validation", "test")}
    assert counts["train"] == pytest.approx(1600, abs=60)
    assert counts["validation"] == pytest.approx(200, abs=50)
    backwards = head + "".join(reversed(rows.splitlines(keepends=True)))
    again = read_homedepot(homedepot(tmp_path / "b", train=backwards, attributes=None, test=None))
    assert splits(again) == splits(catalog)  # by the query alone
    assert {q.text: q.id for q in again.queries} == {q.text: q.id for q in catalog.queries}
    shouted = read_homedepot(
        homedepot(tmp_path / "c", train=(head + rows).replace("query ", "QUERY  "), attributes=None)
    )
    assert [*splits(shouted).values()] == [*splits(catalog).values()]


@pytest.mark.parametrize(("file", "old", "new", "row", "column", "words"), [
    ("train.csv", "bracket\",3", "bracket\",3.5", 1, "relevance", "3.5 is no relevance of 1 to 3"),
    ("train.csv", "bracket\",3", "bracket\",", 1, "relevance", "None is no relevance"),
    ("train.csv", "bracket\",3", "bracket\",good", 1, "relevance", "'good' is not a number"),
    ("train.csv", "l bracket", " ", 2, "search_term", "is empty"),
    ("train.csv", "search_term", "query", None, "search_term", "is missing"),
    ("product_descriptions.csv", "100002,", "100001,", 2, "product_uid", "earlier row"),
    ("attributes.csv", '"value"', '"values"', None, "value", "did you mean 'values'"),
])  # fmt: skip
def test_homedepot_refuses(tmp_path, file, old, new, row, column, words):
    assert old in HOMEDEPOT[file]
    with pytest.raises(SchemaError) as caught:
        read_homedepot(write(tmp_path, {**HOMEDEPOT, file: HOMEDEPOT[file].replace(old, new, 1)}, "latin-1"))
    assert (caught.value.source, caught.value.row, caught.value.column) == (file, row, column)
    assert words in str(caught.value)


# BEIR -------------------------------------------------------------------------------------------------------------------


def test_beir(tmp_path):
    catalog = read_beir(write(tmp_path, BEIR))
    assert [(i.id, i.title, i.description) for i in catalog.items] == [
        ("d1", "Tea", "Leaves in water"), ("d2", "Kaffee – schön heiß", ""), ("d3", "d3", "")]  # fmt: skip
    assert catalog.qrels == {"q1": {"d1": 3}, "q2": {"d2": 3, "d1": 0}, "q3": {"d3": 3}}  # relevant or not
    assert splits(catalog) == {"tea": "train", "coffee": "validation", "milk": "test", "no grades": ""}
    assert catalog.unjudged is None
    test_only = {name: text for name, text in BEIR.items() if name not in ("qrels/train.tsv", "qrels/dev.tsv")}
    assert read_beir(write(tmp_path / "test", test_only)).qrels == {"q3": {"d3": 3}}


@pytest.mark.parametrize(("scores", "grades", "expected"), [
    ((1, 0), None, (3, 0)),
    ((2, 1), None, (3, 1)),
    ((3, 2), None, (3, 2)),
    ((3, 1), None, (3, 1)),
    ((0, 0), None, (0, 0)),
    ((4, 2), {4: 3, 2: 1, 1: 0}, (3, 1)),
    ((1, -1), {1: 2, -1: 0}, (2, 0)),
])  # fmt: skip
def test_beir_scores(tmp_path, scores, grades, expected):
    rows = "".join(f"q1\td{i}\t{score}\n" for i, score in enumerate(scores, start=1))
    folder = write(tmp_path, BEIR, qrels_train=None, qrels_dev=None, qrels_test="query-id\tcorpus-id\tscore\n" + rows)
    assert tuple(read_beir(folder, grades).qrels["q1"].values()) == expected


QRELS = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(("changed", "source", "row", "column", "words"), [
    ({"qrels_test": f"{QRELS}q3\td3\t4\n"}, "qrels/test.tsv", 1, "score", "4 is none of 0, 1, 2, 3; say which grade"),
    ({"qrels_test": f"{QRELS}q3\td1\t1\nq3\td3\t-1\n"}, "qrels/test.tsv", 2, "score", "--grades"),
    ({"qrels_test": f"{QRELS}q3\td3\t0.5\n"}, "qrels/test.tsv", 1, "score", "whole number"),
    ({"qrels_test": f"{QRELS}q3\td3\t1\nq3\td3\t0\n"}, "qrels/test.tsv", 2, "score", "same pair"),
    ({"qrels_test": f"{QRELS}q3\td9\t1\n"}, "qrels/test.tsv", 1, "corpus-id", "not in corpus.jsonl"),
    ({"qrels_test": f"{QRELS}q9\td1\t1\n"}, "qrels/test.tsv", 1, "query-id", "not in queries.jsonl"),
    ({"qrels_test": f"{QRELS}q3\td1\t1\nq1\td1\t1\n"}, "qrels/test.tsv", 2, "query-id", "one split"),
    ({"qrels_test": "q3\td3\t1\n"}, "qrels/test.tsv", None, "query-id", "is missing"),
    ({"corpus": '{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}\n'}, "corpus.jsonl", 2, "_id", "earlier row"),
    ({"corpus": '{"_id": "d1", "text": "x"}\n{"_id": "d2", "text": \n'}, "corpus.jsonl", 2, "", "not JSON"),
    ({"corpus": '{"_id": "d1", "text": "x"}\n{"id": "d2", "text": "y"}\n'}, "corpus.jsonl", 2, "_id", "is empty"),
    ({"corpus": ""}, "corpus.jsonl", None, "", "is empty"),
    ({"queries": '{"_id": "q1", "text": ""}\n'}, "queries.jsonl", 1, "text", "is empty"),
])  # fmt: skip
def test_beir_refuses(tmp_path, changed, source, row, column, words):
    with pytest.raises(SchemaError) as caught:
        read_beir(write(tmp_path, BEIR, **changed))
    assert (caught.value.source, caught.value.row, caught.value.column) == (source, row, column)
    assert words in str(caught.value)


def test_beir_reads_odd_lines(tmp_path):
    """Ids that are numbers, no titles at all, blank lines, a byte order mark, text that is not UTF-8."""
    corpus = '\ufeff{"_id": 1, "text": "tea"}\n\n{"_id": 2, "text": "coffee", "title": null}\n'
    files = {**BEIR, "qrels/test.tsv": f"{QRELS}q3\t2\t1\n", "qrels/train.tsv": None, "qrels/dev.tsv": None}
    catalog = read_beir(write(tmp_path / "a", {n: t for n, t in files.items() if t is not None}, corpus=corpus))
    assert [(i.id, i.title) for i in catalog.items] == [("1", "tea"), ("2", "coffee")]
    write(tmp_path / "b", BEIR)
    (tmp_path / "b" / "corpus.jsonl").write_bytes(BEIR["corpus.jsonl"].encode("latin-1", "replace"))
    with pytest.raises(SchemaError, match=r"corpus.jsonl, row 2: is not UTF-8"):
        read_beir(tmp_path / "b")


def test_beir_refuses_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus.jsonl is not there; give a folder with"):
        read_beir(tmp_path)
    write(tmp_path, {**BEIR, "qrels/eval.tsv": QRELS})
    with pytest.raises(ValueError, match=r"eval.tsv is none of train.tsv, dev.tsv, test.tsv"):
        read_beir(tmp_path)
    write(tmp_path / "none", BEIR, qrels_train=None, qrels_dev=None, qrels_test=None)
    with pytest.raises(FileNotFoundError, match="holds no train.tsv, dev.tsv or test.tsv"):
        read_beir(tmp_path / "none")
    with pytest.raises(ValueError, match="grades of 0 to 3"):
        read_beir(tmp_path, {1: 4})


# Folders and commands ---------------------------------------------------------------------------------------------------


def samples(folder):
    esci(folder / "esci")
    write(folder / "wands", WANDS)
    homedepot(folder / "homedepot")
    write(folder / "beir", BEIR)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["data", "import", *map(str, arguments)])


@pytest.mark.parametrize("name", READERS)
def test_import_writes_what_the_reader_reads(tmp_path, name):
    read = READERS[name](samples(tmp_path) / name)
    for _ in range(2):  # a second import takes the place of the first
        result = run(name, tmp_path / name, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
    assert f"{len(read.items)} items, {len(read.queries)} queries" in result.output
    loaded = Catalog.load(tmp_path / "out")
    assert loaded.items.table == read.items.table
    assert [*loaded.queries] == [*read.queries]
    assert loaded.qrels == read.qrels
    assert loaded.metadata == read.metadata
    assert loaded.metadata["name"] == name
    assert loaded.unjudged is None


def test_import_options(tmp_path):
    samples(tmp_path)
    result = run("esci", tmp_path / "esci", "--locale", "es", "--version", "large", "--out", tmp_path / "es")
    assert "1 items, 1 queries (test 1), 1 grades (3: 1)" in result.output
    result = run("beir", tmp_path / "beir", "--grades", "0=1,1=2", "--out", tmp_path / "b")
    assert "4 queries (train 1, validation 1, test 1, no split 1), 4 grades (2: 3, 1: 1)" in result.output
    for arguments, words in (
        (("mteb", "x"), "use esci, wands, homedepot, beir"),
        (("wands", tmp_path / "wands", "--locale", "us"), "wands takes no --locale"),
        (("beir", tmp_path / "beir", "--grades", "1:3"), "such as 0=0,1=2,2=3"),
        (("beir", tmp_path / "beir", "--grades", "0=0"), "1 is none of 0"),
    ):
        result = run(*arguments, "--out", tmp_path / "none")
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
        assert not (tmp_path / "none").exists()


def test_import_keeps_somebodys_own_catalog(tmp_path):
    samples(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "items.csv").write_text("id,title\na,mug\n")
    (own / "catalog.json").write_text(json.dumps({"unjudged": 0}))
    result = run("wands", tmp_path / "wands", "--out", own)
    assert result.exit_code == 2
    assert "give another folder" in " ".join(result.output.split())
    assert len(Catalog.load(own).items) == 1


@pytest.mark.filterwarnings("ignore:.*swigvarlink")
def test_an_imported_folder_is_evaluated(tmp_path, static_model):
    samples(tmp_path)
    assert run("wands", tmp_path / "wands", "--out", tmp_path / "shop").exit_code == 0
    result = CliRunner().invoke(app, ["evaluate", str(static_model), "--data", str(tmp_path / "shop")])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines()[1:]}
    assert rows["bm25"][0] == "0.500"  # finds the plate for "décor", its only good item, and nothing for the chair
    assert len(rows) == 2
