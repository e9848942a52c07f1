"""Small text modules of the usual classes, with tokenizers built from a caption vocabulary."""

import string

from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5EncoderModel, T5Tokenizer


def words_of(captions: list[str]) -> list[str]:
    """Every word of the captions, sorted; hyphenated words stay whole."""
    return sorted({word for caption in captions for word in caption.split()})


def build_t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A unigram tokenizer: one piece a word, single letters for words it was not made for."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words_of(captions)]
    known = {piece for piece, _ in pieces}
    letters = string.ascii_lowercase + string.digits + "-"
    pieces += [(letter, -10.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=256)


def build_bert_tokenizer(captions: list[str]) -> BertTokenizer:
    """A word-piece tokenizer: whole words, and letters for words it was not made for."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "-"]
    tokens += sorted({part for word in words_of(captions) for part in word.split("-")})
    letters = string.ascii_lowercase + string.digits
    tokens += [letter for letter in letters if letter not in tokens]
    tokens += [f"##{letter}" for letter in letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, model_max_length=77)


def build_t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=width // 16,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config).eval()


def build_bert(tokenizer: BertTokenizer, width: int) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        intermediate_size=2 * width,
        max_position_embeddings=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertModel(config).eval()
