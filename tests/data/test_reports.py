"""Report embeddings: TF-IDF + SVD, text encoders with tiny random models, the cache, files, report readers."""

from __future__ import annotations

import json
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dre_fast.data import text_encoders
from dre_fast.data.cohort import Cohort, CohortError, SlideRecord
from dre_fast.data.files import write_tensors
from dre_fast.data.reports import ReportEmbeddings, ReportError, embed_reports, match_reports, read_reports
from dre_fast.data.text_encoders import TextEncoder, chunks, pool
from dre_fast.data.tfidf import TfidfSvd

pytest.importorskip("sklearn", reason="needs scikit-learn")
transformers = pytest.importorskip("transformers", reason="needs transformers")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors")

WORDS = ["lung", "adenocarcinoma", "squamous", "carcinoma", "lymph", "node", "metastasis", "margin"]
WORDS += ["negative", "grade", "keratin", "gland"]


def some_reports(count: int = 30, words: int = 12, seed: int = 0) -> dict[str, str]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(WORDS), (count, words), generator=generator)
    return {f"case{i}": " ".join(WORDS[w] for w in row) for i, row in enumerate(draws.tolist())}


def save_tokenizer(folder: Path, special: str) -> int:
    """A word-level tokenizer; ``special`` "bert": [CLS] A [SEP] with padding, "llama": <s> A without padding token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    first, last = ("[CLS]", "[SEP]") if special == "bert" else ("<s>", "</s>")
    names = ["[PAD]", "[UNK]", first, last, "tissue", *WORDS]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"{first} $A {last}" if special == "bert" else f"{first} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    padding = {"pad_token": "[PAD]"} if special == "bert" else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token=first, eos_token=last, **padding
    ).save_pretrained(folder)
    return len(names)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    size = save_tokenizer(folder, "bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The width of LLaMA-2 7B, one thin layer, few words."""
    folder = tmp_path_factory.mktemp("llama")
    size = save_tokenizer(folder, "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=4096,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.LlamaModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# ---- TF-IDF + SVD


def test_tfidf_vectors_have_unit_norm_and_are_repeatable():
    reports = some_reports()
    first, second = (embed_reports(reports, dim=8) for _ in range(2))
    assert first.case_ids == list(reports)
    assert first.matrix.shape == (30, 8)
    assert first.matrix.dtype == torch.float32
    torch.testing.assert_close(first.matrix.norm(dim=1), torch.ones(30))
    assert torch.equal(first.matrix, second.matrix)
    assert first.model == second.model
    assert embed_reports(reports, dim=8, fit_on=list(reports)[:20]).model != first.model


def test_tfidf_is_the_projection_it_says():
    """Against a dense computation of (1 + log tf) * idf, L2, projection, L2."""
    reports = some_reports(12)
    basis = embed_reports(reports, dim=5).basis
    assert basis is not None
    rows = []
    for text in reports.values():
        words = text.split()
        grams = words + [f"{a} {b}" for a, b in pairwise(words)]
        counts = torch.tensor([float(grams.count(term)) for term in basis.terms], dtype=torch.float64)
        weight = (
            torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0) * torch.from_numpy(basis.idf).double()
        )
        rows.append(weight / weight.norm())
    document_frequency = sum((row > 0).double() for row in rows)
    torch.testing.assert_close(
        torch.from_numpy(basis.idf).double(), (13 / (1 + document_frequency)).log() + 1
    )
    dense = torch.stack(rows)
    leading = torch.linalg.svd(dense).Vh[:5]
    components = torch.from_numpy(basis.components).double()
    torch.testing.assert_close(
        components @ components.T, torch.eye(5, dtype=torch.float64), atol=1e-5, rtol=0
    )
    # The same subspace, whatever the signs.
    torch.testing.assert_close(leading.T @ leading, components.T @ components, atol=1e-4, rtol=0)
    expected = torch.nn.functional.normalize(dense @ components.T, dim=1)
    torch.testing.assert_close(basis.transform(reports).double(), expected, atol=1e-6, rtol=0)


def test_tfidf_fits_on_the_given_cases_alone():
    reports = some_reports()
    fitted = list(reports)[:20]
    changed = {**reports, "case29": "mesothelioma " * 5 + reports["case29"]}
    one, two = embed_reports(reports, dim=6, fit_on=fitted), embed_reports(changed, dim=6, fit_on=fitted)
    assert one.model == two.model
    assert torch.equal(one.rows(fitted), two.rows(fitted))
    assert one.basis is not None
    assert "mesothelioma" not in one.basis.terms
    with pytest.raises(ReportError, match="case 'nobody' has no report"):
        embed_reports(reports, fit_on=["nobody"])


def test_fewer_reports_than_dimensions_are_noted():
    embedded = embed_reports(some_reports(10), dim=256)
    assert embedded.dim <= 10
    assert embedded.details["notes"] == [
        f"{embedded.dim} dimensions instead of 256: the 10 fitted reports span no more"
    ]
    repeated = {f"c{i}": text for i, text in enumerate(["lung gland", "lymph node"] * 6)}
    assert embed_reports(repeated, dim=8).dim == 2


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ({}, "no reports"),
        ({"a": "lung", "b": " \n"}, "case 'b': its report is empty"),
        ({"a": "lung tumour"}, "at least two different reports"),
        ({"a": "lung tumour", "b": "lung tumour"}, "at least two different reports"),
        ({"a": "- -", "b": ". ."}, "is there any word"),
    ],
)
def test_reports_that_cannot_be_fitted(reports, message):
    with pytest.raises(ReportError, match=message):
        embed_reports(reports)


def test_a_report_without_known_words_is_named():
    reports = {**some_reports(5), "odd": "zzz qqq"}
    with pytest.raises(ReportError, match="case 'odd': its report 'zzz qqq' shares no word"):
        embed_reports(reports, fit_on=list(reports)[:5])


def test_the_fitted_basis_embeds_a_later_cohort(tmp_path):
    reports = some_reports()
    fitted = embed_reports(reports, dim=6)
    assert fitted.basis is not None
    fitted.basis.save(tmp_path / "basis.safetensors")
    later = embed_reports(dict(list(reports.items())[3:7]), model=str(tmp_path / "basis.safetensors"))
    assert later.model == fitted.model
    torch.testing.assert_close(later.matrix, fitted.matrix[3:7])
    with pytest.raises(ReportError, match=r"no\.safetensors: cannot read"):
        TfidfSvd.load(tmp_path / "no.safetensors")
    fitted.save(tmp_path / "reports.safetensors")
    with pytest.raises(ReportError, match="not a fitted tfidf-svd model"):
        embed_reports(reports, model=str(tmp_path / "reports.safetensors"))
    with pytest.raises(ReportError, match="a fitted tfidf-svd model, not embeddings"):
        ReportEmbeddings.load(tmp_path / "basis.safetensors")


def test_real_reports_of_one_stage_are_not_a_blur(test_data):
    texts = dict(list(read_reports(test_data / "reports/tcga_reports.csv").items())[:120])
    embedded = embed_reports(texts, dim=64)
    cosines = embedded.matrix @ embedded.matrix.T
    off_diagonal = cosines[~torch.eye(120, dtype=torch.bool)]
    assert off_diagonal.mean() < 0.3
    assert off_diagonal.std() > 0.1


# ---- text encoders


def by_hand(folder: Path, text: str, pooling: str) -> torch.Tensor:
    """One text, no batch, no padding, straight through transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[
            0
        ]
    return {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_bert_like_poolings(bert, pooling):
    reports = {"short": "lung gland", "long": " ".join(WORDS), "again": "lung gland"}
    embedded = embed_reports(reports, str(bert), pooling, batch_size=2)
    for case in reports:
        torch.testing.assert_close(
            embedded.rows([case])[0], by_hand(bert, reports[case], pooling), atol=1e-5, rtol=1e-4
        )
    assert torch.equal(embedded.rows(["short"]), embedded.rows(["again"]))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_llama_without_padding_token(llama, pooling):
    reports = {"short": "lung gland", "long": " ".join(WORDS), "middle": "keratin margin negative"}
    encoder = TextEncoder(str(llama), pooling, batch_size=3)
    together = encoder.embed(reports)
    assert together.shape == (3, 4096)
    encoder.batch_size = 1
    torch.testing.assert_close(together, encoder.embed(reports), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together[0], by_hand(llama, reports["short"], pooling), atol=1e-4, rtol=1e-3)


def test_first_token_of_a_decoder_is_refused(llama):
    with pytest.raises(ReportError, match=r"same vector for every report.*'mean' or 'last'"):
        embed_reports({"a": "lung gland", "b": "lymph node"}, str(llama), "cls")


def test_long_reports_are_averaged_over_windows(bert):
    words = [WORDS[i % len(WORDS)] for i in range(50)]
    encoder = TextEncoder(str(bert), "mean")
    assert encoder.max_length == 24
    pieces = chunks(words, 22)
    assert [len(piece) for piece in pieces] == [22, 22, 10]
    vectors = torch.stack([by_hand(bert, " ".join(piece), "mean") for piece in pieces])
    expected = (vectors * torch.tensor([22.0, 22.0, 10.0])[:, None]).sum(0) / 54
    torch.testing.assert_close(encoder.embed({"a": " ".join(words)})[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 8, 16, 100])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 1000])
def test_windows_cover_every_token(size, length):
    tokens = list(range(length))
    windows = chunks(tokens, size)
    assert all(1 <= len(window) <= size for window in windows)
    assert sorted({token for window in windows for token in window}) == tokens
    for before, after in pairwise(windows):
        assert len(before) == size
        assert after[-1] > before[-1]
        assert before[-1] - after[0] + 1 == size // 8


def test_pool_ignores_padding():
    states = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(pool(states, mask, "mean")[0], states[0, :3].mean(0))
    assert torch.equal(pool(states, mask, "last"), torch.stack([states[0, 2], states[1, 4]]))
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])


class Interrupted(Exception):
    pass


def test_interrupted_runs_go_on_where_they_stopped(bert, tmp_path, monkeypatch):
    reports = some_reports(9)
    plain = TextEncoder(str(bert), batch_size=2).embed(reports)
    embedded: list[str] = []
    original = TextEncoder._embed_texts

    def counting(self, texts, cases):
        if len(embedded) >= 4:
            raise Interrupted
        embedded.extend(texts)
        return original(self, texts, cases)

    monkeypatch.setattr(TextEncoder, "_embed_texts", counting)
    with pytest.raises(Interrupted):
        TextEncoder(str(bert), batch_size=2).embed(reports, tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    done = set(embedded)
    rest: list[str] = []
    monkeypatch.setattr(
        TextEncoder,
        "_embed_texts",
        lambda self, texts, cases: rest.extend(texts) or original(self, texts, cases),
    )
    torch.testing.assert_close(TextEncoder(str(bert), batch_size=2).embed(reports, tmp_path), plain)
    assert len(rest) == 5
    assert not done & set(rest)
    rest.clear()
    more = {**reports, "new": "lymph node"}
    TextEncoder(str(bert)).embed(more, tmp_path)
    assert rest == ["lymph node"]
    assert not list(tmp_path.rglob(".*"))  # no temporary file left


def test_the_cache_tells_models_and_settings_apart(bert, tmp_path):
    encoders = [
        TextEncoder(str(bert)),
        TextEncoder(str(bert), "last"),
        TextEncoder(str(bert), max_length=16),
        TextEncoder(str(bert), dtype="bfloat16"),
    ]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bert.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert TextEncoder(str(copy)).identity == encoders[0].identity  # the content counts, not the folder
    model = transformers.BertModel.from_pretrained(copy, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] += 1
    model.save_pretrained(copy)
    encoders.append(TextEncoder(str(copy)))
    assert len({encoder.identity for encoder in encoders}) == len(encoders)
    for encoder in encoders:
        encoder.embed({"a": "lung gland"}, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(encoders)


def test_a_damaged_cache_file_is_named(bert, tmp_path):
    encoder = TextEncoder(str(bert))
    encoder.embed({"a": "lung gland"}, tmp_path)
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(b"half")
    with pytest.raises(ReportError, match=f"{file.name} is damaged.*delete it"):
        encoder.embed({"a": "lung gland"}, tmp_path)


def test_faulty_encoders_and_settings(bert, tmp_path, monkeypatch):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(
        ReportError, match=r"cannot load the text encoder .*nothing(.|\n)*tfidf-svd needs no download"
    ):
        TextEncoder(str(tmp_path / "nothing"))
    with pytest.raises(ReportError, match="pooling must be one of mean, last, cls, got 'max'"):
        TextEncoder(str(bert), "max")
    with pytest.raises(ReportError, match="dtype must be one of"):
        TextEncoder(str(bert), dtype="int8")
    with pytest.raises(ReportError, match="batch_size must be at least 1"):
        TextEncoder(str(bert), batch_size=0)
    for length in (9, 25):
        with pytest.raises(ReportError, match=f"max_length must be 10 to 24 .*, got {length}"):
            TextEncoder(str(bert), max_length=length)
    encoder = TextEncoder(str(bert))
    with pytest.raises(ReportError, match="case 'x': the tokenizer finds nothing"):
        encoder.embed({"x": "\u200b \n"} if not encoder._tokens("\u200b") else {"x": " \n"})
    monkeypatch.setattr(text_encoders, "pool", lambda states, mask, pooling: states[:, 0] / 0)
    with pytest.raises(ReportError, match="case 'a': its embedding has NaN or Inf under dtype float32"):
        encoder.embed({"a": "lung"})


def test_code_that_comes_with_a_model_is_never_run(bert, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ReportError, match="cannot load the text encoder"):
        TextEncoder(str(folder))
    assert not (tmp_path / "ran").exists()


# ---- the file


def test_files_round_trip(tmp_path):
    embedded = embed_reports(some_reports(), dim=8)
    path = tmp_path / "new" / "reports.safetensors"
    embedded.save(path)
    loaded = ReportEmbeddings.load(path)
    assert loaded.case_ids == embedded.case_ids
    assert loaded.model == embedded.model
    assert loaded.details == embedded.details
    assert torch.equal(loaded.matrix, embedded.matrix)
    assert len(loaded) == 30
    assert "case3" in loaded
    assert torch.equal(loaded.rows(["case5", "case1", "case5"]), embedded.matrix[[5, 1, 5]])
    with pytest.raises(ReportError, match="case 'nobody' has no report embedding"):
        loaded.rows(["case1", "nobody"])
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_precomputed_vectors_by_case(tmp_path):
    vectors = {"B": torch.randn(7), "A": torch.randn(1, 7), "C": torch.randn(7).half()}
    safetensors_torch.save_file(vectors, tmp_path / "v.safetensors")
    loaded = ReportEmbeddings.load(tmp_path / "v.safetensors")
    assert sorted(loaded.case_ids) == ["A", "B", "C"]
    assert loaded.matrix.shape == (3, 7)
    torch.testing.assert_close(loaded.rows(["A", "C"]), torch.stack([vectors["A"][0], vectors["C"].float()]))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"A": torch.zeros(7), "B": torch.zeros(8)}, r"case 'B': shape \(8,\); expected one vector \[7\]"),
        ({"A": torch.zeros(7, 1)}, r"case 'A': shape \(7, 1\)"),
        ({"A": torch.tensor([1.0, float("nan")])}, "case 'A': its embedding has NaN"),
        ({}, "no vectors"),
    ],
)
def test_faulty_precomputed_vectors(tmp_path, vectors, message):
    safetensors_torch.save_file(vectors, tmp_path / "v.safetensors")
    with pytest.raises(ReportError, match=message):
        ReportEmbeddings.load(tmp_path / "v.safetensors")


def test_unreadable_embedding_files(tmp_path):
    with pytest.raises(ReportError, match=r"none\.safetensors: no such file"):
        ReportEmbeddings.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(ReportError, match=r"bad\.safetensors: cannot read"):
        ReportEmbeddings.load(tmp_path / "bad.safetensors")
    with pytest.raises(ReportError, match="case 'a' has two"):
        ReportEmbeddings(["a", "b", "a"], torch.zeros(3, 2), "m")
    with pytest.raises(ReportError, match=r"2 cases need a matrix"):
        ReportEmbeddings(["a", "b"], torch.zeros(3, 2), "m")


# ---- report files


def test_embeddings_of_a_newer_format_are_refused(tmp_path):
    vectors = torch.zeros(1, 4)  # one case: its shape alone could be a file of vectors by case
    write_tensors(tmp_path / "r.safetensors", {"embeddings": vectors}, {"dre_fast-reports-2": "{}"})
    with pytest.raises(
        ReportError, match=r"r\.safetensors: written by another dre_fast \(format dre_fast-reports-2"
    ):
        ReportEmbeddings.load(tmp_path / "r.safetensors")


def test_report_csv_layouts(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text('patient_filename,label,text\nTCGA-05-4244.be78,0,"a, b"\nTCGA-05-4249.11,1,\n')
    assert read_reports(file) == {"TCGA-05-4244.be78": "a, b"}
    file.write_text("Case_ID;Report\nP1;lung\nP1;lung \n")
    assert read_reports(file) == {"P1": "lung"}
    file.write_text("case_id,text\nP1,lung\nP1,gland\n")
    with pytest.raises(ReportError, match=r"r\.csv, row 3: 'P1' has two different reports"):
        read_reports(file)
    file.write_text("case_id,text\n,lung\n")
    with pytest.raises(ReportError, match=r"row 2, column 'case_id': empty"):
        read_reports(file)
    file.write_text("case_id,words\nP1,lung\n")
    with pytest.raises(
        ReportError, match=r"row 1: no text column \(one of text, report\); columns: case_id, words"
    ):
        read_reports(file)
    file.write_text("case_id,text\nP1,\n")
    with pytest.raises(ReportError, match="no report in it"):
        read_reports(file)
    with pytest.raises(CohortError, match="no such file"):
        read_reports(tmp_path / "none.csv")


def test_report_json_layouts(tmp_path):
    file = tmp_path / "annotation.json"
    entries = [
        {"id": "P1", "report": "lung", "image_path": ["x"], "split": "train"},
        {"id": "P2", "report": "gland"},
    ]
    for content in ({"train": entries[:1], "val": entries[1:]}, entries, {"P1": "lung", "P2": "gland"}):
        file.write_text(json.dumps(content))
        assert read_reports(file) == {"P1": "lung", "P2": "gland"}
    file.write_text(json.dumps({"train": [entries[0], {"id": "P2"}]}))
    with pytest.raises(ReportError, match="'train', entry 1: needs texts under 'id' and 'report'"):
        read_reports(file)
    file.write_text("{")
    with pytest.raises(ReportError, match="cannot read this as JSON"):
        read_reports(file)


def test_report_folder(tmp_path):
    (tmp_path / "P1.txt").write_text("lung\n")
    (tmp_path / "P2.txt").write_text("gland")
    assert read_reports(tmp_path) == {"P1": "lung", "P2": "gland"}


def test_reports_in_another_encoding_or_of_another_kind_are_named(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "c1.txt").write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(ReportError, match=r"c1\.txt: not UTF-8 \(at byte 3\)"):
        read_reports(tmp_path / "reports")
    (tmp_path / "data.csv").write_text("x" * 100_000 + "\n1\n")
    with pytest.raises(ReportError, match="no id column") as error:
        read_reports(tmp_path / "data.csv")
    assert len(str(error.value)) < 1000  # not the whole of a file that is no table


def test_reports_find_their_cases():
    slides = [("TCGA-05-4244-01Z-00-DX1", "TCGA-05-4244"), ("s2", "P2"), ("s3", "P3"), ("s4", "P4.1")]
    cohort = Cohort([SlideRecord(slide, case) for slide, case in slides])
    texts = {
        "P4.1": "d",
        "s2": "b",
        "TCGA-05-4244.be78-11": "a",
        "TCGA-05-4244-01Z-00-DX9": "a",
        "other": "z",
    }
    assert match_reports(texts, cohort) == {"TCGA-05-4244": "a", "P2": "b", "P4.1": "d"}
    with pytest.raises(ReportError, match="case 'P2' has two different reports: 's2' and 'P2'"):
        match_reports({"s2": "b", "P2": "c"}, cohort)
    with pytest.raises(ReportError, match=r"none of the 1 reports .*'other'.*'TCGA-05-4244'"):
        match_reports({"other": "z"}, cohort)


def test_real_tcga_reports(test_data):
    texts = read_reports(test_data / "reports/tcga_reports.csv")
    assert len(texts) == 1034
    cohort = Cohort([SlideRecord(f"{name[:12]}-01Z-00-DX1", name[:12]) for name in texts])
    assert set(match_reports(texts, cohort)) == set(cohort.cases)
