"""The vocabularies of ChatGLM as far as one conversation needs them, and that conversation's ids.

The ids of whole prompts are those that chatglm.cpp (MIT) records of the real tokenizers
(chatglm_test.cpp); here each piece of them stands at its real id, among fillers that no text holds.
"""

from dataclasses import replace
from functools import cache

from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from research.tokenize import formats, spm
from research.tokenize.control import add_control
from research.tokenize.tokenizer import Tokenizer

ANSWER = "你好👋！我是人工智能助手 Chat{}，很高兴见到你，欢迎问我任何问题。"
ASKED = "晚上睡不着应该怎么办"

CHATGLM = {
    **{"▁[": 53, "[": 52, "Round": 6945, "▁": 5, "0": 8, "1": 9, "]": 42, "<n>": 4, "问": 64286},
    **{
        ":": 12,
        "你好": 74874,
        "答": 67342,
        "!": 35,
        "我是": 65806,
        "人工智能": 68241,
        "助手": 75890,
    },
    **{"▁Chat": 14132, "GL": 5388, "M": 340, "-": 11, "6": 21, "B": 222, ",": 6, "很高兴": 76693},
    **{"见到": 66877, "你": 63852, "欢迎": 66430, "问我": 68747, "任何问题": 102501, "。": 63823},
    **{"晚上": 65450, "睡不着": 83400, "应该": 64213, "怎么办": 66846},
}
CHATGLM_CONTROL = {"[MASK]": 130000, "[gMASK]": 130001, "<sop>": 130004, "<eop>": 130005}
CHATGLM2 = {
    **{"▁[": 790, "[": 30995, "R": 30951, "ound": 517, "▁": 30910, "1": 30939, "2": 30943},
    **{"3": 30966, "]": 30996, "问": 54761, "：": 31211, "你好": 39701, "答": 55437, "▁你": 36474},
    **{"好": 54591, "！": 31404, "我是": 33030, "人工智能": 34797, "助手": 42481, "▁Chat": 22011},
    **{"GL": 10461, "M": 30944, "-": 30941, "6": 30978, "B": 30949, "，": 31123, "很高兴": 48895},
    **{"见到": 35214, "你": 54622, "欢迎": 32616, "问我": 39905, "任何": 31901, "问题": 31639},
    **{"。": 31155, "晚上": 32820, "睡": 54266, "不着": 31876, "应该怎么办": 35153},
}

# fmt: off
CHATGLM_PROMPT = [
    53, 6945, 5, 8, 42, 4, 64286, 12, 74874, 4, 67342, 12, 74874, 130328, 130247, 130233, 130227,
    35, 65806, 68241, 75890, 14132, 5388, 340, 11, 21, 222, 6, 76693, 66877, 63852, 6, 66430,
    68747, 102501, 63823, 4, 52, 6945, 5, 9, 42, 4, 64286, 12, 65450, 83400, 64213, 66846, 4,
    67342, 12, 130001, 130004,
]
CHATGLM2_PROMPT = [
    64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13, 55437,
    31211, 39701, 243, 162, 148, 142, 31404, 33030, 34797, 42481, 22011, 10461, 30944, 30943,
    30941, 30978, 30949, 31123, 48895, 35214, 54622, 31123, 32616, 39905, 31901, 31639, 31155, 13,
    13, 30995, 30951, 517, 30910, 30943, 30996, 13, 13, 54761, 31211, 32820, 54266, 31876, 35153,
    13, 13, 55437, 31211,
]
CHATGLM3_PROMPT = [
    64790, 64792, 64795, 30910, 13, 36474, 54591, 64796, 30910, 13, 36474, 54591, 243, 162, 148,
    142, 31404, 33030, 34797, 42481, 22011, 10461, 30944, 30966, 30941, 30978, 30949, 31123, 48895,
    35214, 54622, 31123, 32616, 39905, 31901, 31639, 31155, 64795, 30910, 13, 30910, 32820, 54266,
    31876, 35153, 64796,
]
# fmt: on


def talk(name):
    """The conversation: a question, the answer of the model of that name, a question."""
    roles = ("user", "assistant", "user")
    texts = ("你好", ANSWER.format(name), ASKED)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def made(pieces, control, size, first_byte):
    """A Unigram tokenizer of `size` pieces with {piece: id} in it; <unk> 0, <s> 1, </s> 2."""
    at = {index: (piece, spm.NORMAL) for piece, index in pieces.items()}
    at |= {index: (piece, spm.CONTROL) for piece, index in control.items()}
    at |= {first_byte + byte: (f"<0x{byte:02X}>", spm.BYTE) for byte in range(256)}
    at |= {0: ("<unk>", spm.UNKNOWN), 1: ("<s>", spm.CONTROL), 2: ("</s>", spm.CONTROL)}
    model = sentencepiece_model_pb2.ModelProto()
    for index in range(size):
        piece, kind = at.get(index, (f" {index}", spm.NORMAL))
        # Two cuts of equally many pieces, ▁你 好 and ▁ 你好: the first is the real one.
        model.pieces.add(piece=piece, type=kind, score=-0.9 if piece == "▁你" else -1.0)
    model.trainer_spec.model_type = spm.UNIGRAM
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return Tokenizer(spm.backend(model), bos_id=1, eos_id=2, unk_id=0)


@cache
def chatglm():
    """ChatGLM-6B: compatibility characters are folded, a line break is the piece <n>."""
    tokenizer = made(CHATGLM, CHATGLM_CONTROL, 130_344, 130_088)
    fold = [normalizers.Replace("\n", "<n>"), normalizers.NFKC()]
    tokenizer.backend.normalizer = normalizers.Sequence([*fold, tokenizer.backend.normalizer])
    return replace(tokenizer, bos_id=130004, eos_id=130005)


@cache
def chatglm2():
    return add_control(made(CHATGLM2, {}, 64_789, 3), formats.CHATGLM2_TOKENS)


@cache
def chatglm3():
    return add_control(made(CHATGLM2, {}, 64_789, 3), formats.CHATGLM3_TOKENS)
