"""Chats of every shape people have: what is a target, told by marks or by trial of prefixes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from test_tokens import TOKENIZERS
from tokenizers import decoders

from retrograd.data.chats import Chat, read_chats
from retrograd.data.documents import load_documents
from retrograd.data.rows import Rows, build_rows

# as ChatML; a system prompt of its own where there is none, as SmolLM2's
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # as Llama 2's: no generation prompt, and none needed
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
HEADED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # a header, and no generation prompt
LAST = (  # as Qwen3's: what is written of a turn depends on whether it is the last
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Bo."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still  Bo"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in TALK]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def chatty(template: str, name: str = "bytes") -> Any:
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def said(rows: Rows, tokenizer: Any, row: int = 0) -> list[str]:
    """The passages that are targets, as text."""
    found: list[list[int]] = []
    before = False
    for token, target in zip(rows.input_ids[row].tolist(), rows.target_mask[row].tolist()):
        if target and not before:
            found.append([])
        if target:
            found[-1].append(token)
        before = target
    return [tokenizer.decode(ids) for ids in found]


def rows_of(tokenizer: Any, assistant_only: bool = True, **columns: list[Any]) -> Rows:
    return build_rows(Dataset.from_dict(columns), tokenizer, assistant_only_loss=assistant_only)


@pytest.mark.parametrize("name", ["bytes", "bytes-trimmed", "bytes-bos", "slow"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Bo.<|im_end|>", "Still  Bo<|im_end|>"]),
        (MARKED, ["Bo.<|im_end|>", "Still  Bo<|im_end|>"]),
        (BRACKETS, [" Bo.</s>", " Still  Bo</s>"]),
    ],
)
def test_what_the_assistant_says_and_that_it_ends(name: str, template: str, expected: list[str]) -> None:
    tokenizer = chatty(template, name)
    rows = rows_of(tokenizer, messages=[TALK])
    assert said(rows, tokenizer) == expected
    whole = rows_of(tokenizer, False, messages=[TALK])
    assert rows.input_ids[0].tolist() == whole.input_ids[0].tolist()
    assert whole.target_mask[0][1:].all()
    written = tokenizer.apply_chat_template(TALK, tokenize=True)
    assert rows.input_ids[0].tolist() == written["input_ids"]


def test_marks_give_what_transformers_gives() -> None:
    """Where tokens end with the passages, as here by bytes."""
    tokenizer = chatty(MARKED)
    found = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    assert rows_of(tokenizer, messages=[TALK]).target_mask[0].tolist() == [bool(x) for x in found["assistant_masks"]]


def test_marks_and_trial_agree() -> None:
    marked, tried = (
        rows_of(chatty(template), messages=[TALK]) for template in (MARKED, CHATML.split("{% endif %}", 1)[1])
    )
    assert marked.digest() == tried.digest()


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_sharegpt_keys_are_roles(column: str) -> None:
    tokenizer = chatty(CHATML)
    plain = rows_of(tokenizer, messages=[TALK])
    assert rows_of(tokenizer, **{column: [SHAREGPT]}).digest() == plain.digest()
    with pytest.raises(ValueError, match="document 1, message 0 is from 'narrator', which is none of human, gpt"):
        rows_of(tokenizer, conversations=[SHAREGPT, [{"from": "narrator", "value": "x"}]])


def test_prompts_and_completions_of_messages() -> None:
    tokenizer = chatty(CHATML)
    rows = rows_of(tokenizer, False, prompt=[TALK[:1], TALK[:2]], completion=[TALK[1:2], TALK[2:]])
    assert said(rows, tokenizer) == ["Bo.<|im_end|>\n"]
    assert said(rows, tokenizer, 1) == [
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nStill  Bo<|im_end|>\n"
    ]
    rows = rows_of(tokenizer, prompt=[TALK[:1], TALK[:2]], completion=[TALK[1:2], TALK[2:]])
    assert (said(rows, tokenizer), said(rows, tokenizer, 1)) == (["Bo.<|im_end|>"], ["Still  Bo<|im_end|>"])
    sharegpt = rows_of(tokenizer, prompt=[SHAREGPT[:1], SHAREGPT[:2]], completion=[SHAREGPT[1:2], SHAREGPT[2:]])
    assert sharegpt.digest() == rows.digest()
    skipped = rows_of(tokenizer, False, prompt=[TALK[:1], TALK[:1]], completion=[[], TALK[1:2]])
    assert skipped.skipped == {0: "blank"}


TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}


def test_tools_are_written_and_calls_are_the_assistants() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "tide", "arguments": {"at": "noon"}}}],
    }
    chat = [TALK[0], call, {"role": "tool", "content": "high"}, {"role": "assistant", "content": "High."}]
    tokenizer = chatty(CHATML)
    rows = [rows_of(tokenizer, messages=[chat], tools=[tools]) for tools in ([TOOL], json.dumps([TOOL]))]
    assert said(rows[0], tokenizer) == ['CALL tide{"at": "noon"}<|im_end|>', "High.<|im_end|>"]
    assert "TOOLS [" in tokenizer.decode(rows[0].input_ids[0])
    assert rows[0].digest() == rows[1].digest()
    pair = rows_of(tokenizer, False, prompt=[chat[:1]], completion=[chat[1:]], tools=[[TOOL]])
    assert pair.input_ids[0].tolist() == rows[0].input_ids[0].tolist()
    with pytest.raises(ValueError, match="document 1 has tools, and the chat template writes none"):
        rows_of(chatty(BRACKETS), False, messages=[TALK, TALK], tools=[None, [TOOL]])
    with pytest.raises(ValueError, match="document 0: tools are a text that is not JSON"):
        rows_of(tokenizer, messages=[TALK], tools=["[{"])
    with pytest.raises(ValueError, match=r"document 0: tools are .*not a list of JSON schemas"):
        rows_of(tokenizer, messages=[TALK], tools=['{"a": 1}'])


def test_a_key_that_only_other_messages_have_is_no_key() -> None:
    """As columns of structs give it: every message of a parquet file has every key."""
    tokenizer = chatty(CHATML)
    padded = [{**one, "tool_calls": None, "name": None} for one in TALK]
    assert rows_of(tokenizer, messages=[padded]).digest() == rows_of(tokenizer, messages=[TALK]).digest()


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (HEADED, TALK, "message 1: the chat template has no generation prompt, and writes 'assistant: Bo"),
        (LAST, TALK, "writes the messages up to message 1 otherwise when more follow.*generation"),
        (CHATML, TALK[1:], "message 0: the chat template has no generation prompt, and writes '<.im_start.>system"),
        (MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "{% generation %}{% endgeneration %}"), TALK[:1], None),
        (MARKED.replace("m.role == 'assistant'", "m.role == 'bot'"), TALK, "marks 0 passages as generated, and the chat has an assistant"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(template: str, chat: list[Any], message: str | None) -> None:
    if message is None:
        with pytest.raises(ValueError, match=r"no valid target in any of 1 documents \(masked: 1;"):
            rows_of(chatty(template), messages=[chat])
        return
    with pytest.raises(ValueError, match=message):
        rows_of(chatty(template), messages=[chat])
    assert len(rows_of(chatty(template), False, messages=[chat])) == 1  # all of it can be trained on


def test_a_last_turn_written_otherwise_is_told_where_it_is_the_only_one() -> None:
    tokenizer = chatty(LAST)
    assert said(rows_of(tokenizer, messages=[TALK[:2]]), tokenizer) == ["<think></think>Bo.\n"]


def test_a_slow_tokenizer_with_a_token_across_a_boundary_is_refused() -> None:
    class Joined:
        is_fast = False
        chat_template = BRACKETS
        added_tokens_decoder: dict[int, Any] = {}

        def get_chat_template(self, tools: Any = None) -> str:
            return BRACKETS

        def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
            return "".join(one["content"] for one in messages)

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[len(text)] for text in texts]}

    chat = Chat(0, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match="Joined does not tell which characters a token holds"):
        list(read_chats(Joined(), [chat], True))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a b"]}, "assistant_only_loss is for chats .*column 'text' is read here"),
        ({"prompt": ["a"], "completion": ["b"]}, "prompt and completion hold texts, of which the completion alone"),
        ({"input_ids": [[5, 6]]}, "column 'input_ids' is read here"),
    ],
)
def test_documents_without_an_assistant_are_refused(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(chatty(CHATML), **columns)


def test_chats_without_a_template_are_refused_in_every_shape() -> None:
    for columns in ({"conversations": [SHAREGPT]}, {"prompt": [TALK[:1]], "completion": [TALK[1:2]]}):
        with pytest.raises(ValueError, match="has no chat_template: set one"):
            rows_of(TOKENIZERS["bytes"](), False, **columns)


def test_columns_named_by_the_user(tmp_path: Path) -> None:
    rows = [{"text": "x", "dialogue": SHAREGPT, "q": "Who?", "a": " Bo", "answer": "late"}] * 2
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = chatty(CHATML)
    chats = load_documents(str(file), columns=["messages=dialogue"])
    assert (
        build_rows(chats, tokenizer, assistant_only_loss=True).input_ids[1].tolist()
        == rows_of(tokenizer, messages=[TALK]).input_ids[0].tolist()
    )
    pairs = load_documents(str(file), columns=["prompt=q", "completion=a"])
    assert pairs.column_names == ["dialogue", "prompt", "completion", "answer"]  # text would be read in their stead
    quiz = load_documents(str(file), columns=["question=q", "answer=a"])
    assert (quiz["question"][0], quiz["answer"][0], "text" in quiz.column_names) == ("Who?", " Bo", True)
    for columns, message in (
        (["messages=gone"], "no column 'gone'; the data set has text, dialogue"),
        (["chat=dialogue"], "'chat=dialogue' does not say what a column is; write ROLE=COLUMN"),
        (["prompt"], "'prompt' does not say what a column is"),
        (["prompt=q", "completion=q"], "names 'completion' or column 'q' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            load_documents(str(file), columns=columns)
