"""Settings for every test: no network, one thread, no window. They must be set before the libraries are imported.

Below them, what tests share: a small shop and three tiny models with random weights, made on the spot.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",  # its threads and forked workers do not mix
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch and faiss; also makes sums repeatable

import re
from collections import Counter

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy one is slow, which is no failure
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def small_shop():
    """A `Catalog` of 600 items and 120 / 20 / 30 queries (train / validation / test)."""
    from taoemb.shop import generate_shop

    return generate_shop(600, seed=1, train_queries=120, validation_queries=20, test_queries=30).catalog


@pytest.fixture(scope="session")
def small_shop_folder(small_shop, tmp_path_factory):
    """Folder with the saved `small_shop`; do not write into it."""
    folder = tmp_path_factory.mktemp("data") / "small_shop"
    small_shop.save(folder)
    return folder


@pytest.fixture(scope="session")
def shop_words(small_shop):
    """The words of the small shop, most frequent first, then alphabetically."""
    from taoemb.catalog import ItemTemplate

    texts = [*ItemTemplate().texts(small_shop.items), *small_shop.queries.texts]
    counts = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    return sorted(counts, key=lambda word: (-counts[word], word))


@pytest.fixture(scope="session")
def static_model(shop_words, tmp_path_factory):
    """Folder of a sentence-transformers model: static embeddings of 16 dimensions, one vector a word, no Normalize."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", *shop_words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(vocabulary), 16, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("models") / "static"
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(shop_words, tmp_path_factory):
    """Folder of a sentence-transformers model: 2-layer BERT, 32 dimensions, dropout, mean pooling, no Normalize."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    parts = tmp_path_factory.mktemp("models")
    letters = sorted({letter for word in shop_words for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *shop_words[:400]])
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(parts / "bert")  # fmt: skip
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(parts / "bert")
    transformer = Transformer(str(parts / "bert"))
    folder = parts / "tiny_bert"
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(shop_words, tmp_path_factory):
    """Folder of a bare Hugging Face decoder: 2-layer Llama, 32 dimensions, in bfloat16; its tokenizer adds no special
    token, has an eos token and a chat template, and no pad token."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny_llm"
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", *shop_words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, unk_token="[UNK]", eos_token="</s>",
        chat_template="{% for message in messages %}cream {{ message['content'] }}</s>{% endfor %}",
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_llm(shop_words, tmp_path_factory):
    """Folder of a chat model: 2-layer Llama, 32 dimensions, float32, a byte-level BPE tokenizer and a chat template with
    control tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny_chat_llm"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([f" {word}" for word in shop_words], trainer)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template,
        additional_special_tokens=["<|im_start|>"],
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
