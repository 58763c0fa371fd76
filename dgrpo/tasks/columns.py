"""Rows of any dataset: which columns ask and answer, and the prompts and the task that are made of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.utils import logging

from dgrpo.tasks.sources import Rows, read_rows, sources_of
from dgrpo.tasks.task import Task, answer_completion
from dgrpo.tiny.problems import Messages

logger = logging.get_logger(__name__)

# Where no column is named, the first of these that a row has.
_PROMPTS = ("prompt", "messages", "conversations")
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
Prompt = str | Messages


@dataclass
class PromptColumns:
    """How a row becomes a prompt: the settings that all recipes of one's own data share."""

    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompt: a text or messages. Default: prompt, or messages."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message of each conversation that has none."}
    )
    prompt_format: Literal["chat", "plain"] = field(
        default="chat",
        metadata={"help": "A text is a user's message in the chat template, or 'plain': as it is."},
    )

    def __post_init__(self):
        if self.prompt_format not in ("chat", "plain"):
            raise ValueError(f"prompt_format={self.prompt_format!r}: choose 'chat' or 'plain'.")
        if self.prompt_format == "plain" and self.system_prompt:
            raise ValueError(
                f"system_prompt={self.system_prompt!r:.80}: plain text has no system message; write it into the "
                "prompts, or set prompt_format='chat'."
            )

    def asked(self, row: dict[str, Any]) -> tuple[str, Any]:
        """The prompt's column in this row, and what it holds."""
        names = (self.prompt_column,) if self.prompt_column else _PROMPTS
        name = next((name for name in names if name in row), None)
        if name is None:
            raise ValueError(
                f"dataset: prompt_column={self.prompt_column!r}: there is no column {' or '.join(map(repr, names))} "
                f"among {list(row)}. Name the one that asks with --prompt_column."
            )
        value = row[name]
        if is_empty(value):
            remedy = "leave such rows out with --skip_empty true" if isinstance(self, OwnData) else "remove the row"
            raise ValueError(f"dataset: prompt_column={name!r}: it is empty. Fill it in, or {remedy}.")
        return name, value

    def turns(self, row: dict[str, Any]) -> tuple[Prompt, str | None]:
        """The prompt as it stands in the row, and the last message where that is the assistant's."""
        name, value = self.asked(row)
        if isinstance(value, str):
            return value, None
        messages = messages_of(name, value)
        if self.prompt_format == "plain":
            raise ValueError(
                f"dataset: prompt_column={name!r} holds messages, which plain text has no room for; set "
                "prompt_format='chat'."
            )
        last = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if all(message["role"] == "system" for message in messages):
            raise ValueError(f"dataset: prompt_column={name!r}: nothing is asked, there is no message of the user.")
        return messages, last

    def prompt_of(self, row: dict[str, Any], instruction: str = "", examples: Messages | None = None) -> Prompt:
        """The prompt of a row.

        Args:
            row: a row of the dataset.
            instruction: text above what is asked.
            examples: solved prompts to put in front, as turns of a conversation.
        """
        asked, _ = self.turns(row)
        examples = examples or []
        if isinstance(asked, str):
            if self.prompt_format == "plain":
                return "\n\n".join(filter(None, [instruction, *(turn["content"] for turn in examples), asked]))
            asked = [{"role": "user", "content": asked}]
        asked = [dict(message) for message in asked]
        if instruction:
            asked[-1]["content"] = f"{instruction}\n\n{asked[-1]['content']}"
        system = [asked.pop(0)] if asked[0]["role"] == "system" else []
        if not system and self.system_prompt:
            system = [{"role": "system", "content": self.system_prompt}]
        return [*system, *examples, *asked]

    def completion_of(self, row: dict[str, Any], column: str | None, default: str) -> Prompt:
        """The completion of a row, in the form that goes with its prompt: a text, or an assistant's message.

        Args:
            row: a row of the dataset.
            column: the completion's column; None: `default`, or the last message of the conversation.
            default: the column where none is named.
        """
        name = column or default
        value = row.get(name)
        if column is None and name not in row:
            value = self.turns(row)[1]
        if value is None and name not in row:
            raise ValueError(
                f"dataset: {default}_column={column!r}: there is no column {name!r} among {list(row)}, and no "
                f"conversation that ends with the assistant. Name the one that answers with --{default}_column."
            )
        if isinstance(value, list) and value:
            value = messages_of(name, value)[-1]["content"]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"dataset: {default}_column={name!r} is {value!r}; give a text, or messages that end with one."
            )
        return value if self.prompt_format == "plain" else [{"role": "assistant", "content": value}]

    def pairs(self, rows: Rows, columns: dict[str, str | None]) -> Rows:
        """Rows of "prompt" and these completions, all in one form, for `MaskedSFTTrainer` and `VRPOTrainer`.

        Args:
            rows: rows of a dataset.
            columns: the setting's column of each completion; None: the column of the completion's own name.
        """
        named = any((self.prompt_column, self.system_prompt, *columns.values()))
        if self.prompt_format == "plain" and not named and {"prompt", *columns} <= set(rows[0]):
            return rows  # as the trainers read them: texts, or conversations
        made = []
        for number, row in enumerate(rows, 1):
            try:
                completions = {name: self.completion_of(row, column, name) for name, column in columns.items()}
                made.append({"prompt": self.prompt_of(row), **completions})
            except ValueError as error:
                raise ValueError(str(error).replace("dataset:", f"dataset, row {number}:", 1)) from error
        return made


@dataclass
class OwnData(PromptColumns):
    """What else is needed to train on any dataset by rewards."""

    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of the reference, `answer` of the rewards; default: its last message."},
    )  # fmt: skip
    few_shot: str | None = field(
        default=None,
        metadata={"help": "Solved rows put before each prompt ('rows.csv@train[:3]'), nowhere else."},
    )  # fmt: skip
    skip_empty: bool = field(default=False, metadata={"help": "Leave out rows without a prompt or an answer."})
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of the sources of a mixture ('a.csv + b.csv'); default: all rows."}
    )
    stream_rows: int | None = field(
        default=None,
        metadata={"help": "Read only so many rows of each source; of a hub dataset nothing else is downloaded."},
    )
    held_out_share: float = field(
        default=0.2, metadata={"help": "Share of the prompts that is kept for evaluation, unless eval_dataset is set."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share}: must be above 0 and below 1.")
        if self.stream_rows is not None and self.stream_rows < 1:
            raise ValueError(f"stream_rows={self.stream_rows}: must be 1 or more.")

    def answer_of(self, row: dict[str, Any]) -> Any:
        """The reference of a row; None where neither a column nor an assistant's last message holds one."""
        if self.answer_column is None:
            return self.turns(row)[1]
        if self.answer_column not in row:
            raise ValueError(
                f"dataset: answer_column={self.answer_column!r}: there is no such column among {list(row)}. Name the "
                "one with the reference, or leave answer_column out where no reward reads it."
            )
        if is_empty(answer := row[self.answer_column]):
            raise ValueError(
                f"dataset: answer_column={self.answer_column!r}: it is empty. Fill it in, or leave such rows out with "
                "--skip_empty true."
            )
        return answer


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: None, a blank text, an empty list."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def messages_of(name: str, value: Any) -> Messages:
    """The messages of a column, also in ShareGPT's form ({"from", "value"}); ValueError where it holds none."""
    messages = []
    for message in value if isinstance(value, list) else [None]:
        message = dict(message) if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            # The parts of a message in OpenAI's form.
            if other := next((part.get("type") for part in content if part.get("type") != "text"), None):
                raise ValueError(
                    f"dataset: prompt_column={name!r} holds a part of type {other!r}; only texts are read."
                )
            content = "".join(str(part.get("text")) for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"dataset: prompt_column={name!r} is {value!r:.200}; give a text, or messages with a role and a text "
                "as content."
            )
        role = _ROLES.get(role, role)
        if role not in _KNOWN_ROLES:
            raise ValueError(f"dataset: prompt_column={name!r}: role {role!r} is none of {', '.join(_KNOWN_ROLES)}.")
        messages.append({"role": role, "content": content})
    return messages


def words_of(prompt: Prompt) -> str:
    """A prompt's words: prompts that differ in white space only are equal."""
    texts = [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]
    return " ".join(" ".join(texts).split())


def own_data_task(
    data: OwnData, grade: Callable[..., list[float | None]], instruction: str = "", seed: int = 0
) -> Task:
    """The task of any dataset: prompts by the settings, held-out figure the mean of `grade`, no format of its own.

    Args:
        data: the columns and how they are read.
        grade: a reward in TRL's convention.
        instruction: text above what is asked.
        seed: of a mixture.
    """
    examples: Messages = []
    shown: set[str] = set()
    for row in read_rows(data.few_shot, "train") if data.few_shot else []:
        asked, answer = data.prompt_of(row), data.answer_of(row)
        if answer is None:
            raise ValueError(f"few_shot={data.few_shot!r}: a row has no answer; name its column as answer_column.")
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        asked = asked[asked[0]["role"] == "system" :]
        examples += [*asked, {"role": "assistant", "content": str(answer)}]
        shown.add(words_of(data.turns(row)[0]))

    def read(source: str, split: str, config: str | None) -> Rows:
        weights = data.dataset_weights if len(sources_of(source)) > 1 else None
        rows = read_rows(source, split, config, weights=weights, first=data.stream_rows, seed=seed)
        if data.skip_empty:
            names = [*((data.prompt_column,) if data.prompt_column else _PROMPTS), data.answer_column]
            kept = [row for row in rows if not any(is_empty(row[name]) for name in names if name in row)]
            if not kept:
                raise ValueError(f"dataset={source!r}: in every row one of {list(filter(None, names))} is empty.")
            if len(kept) < len(rows):
                logger.warning(f"dataset={source!r}: {len(rows) - len(kept)} of {len(rows)} rows are empty; skipped.")
            rows = kept
        return [row for row in rows if not shown or words_of(data.turns(row)[0]) not in shown]

    def to_row(row: dict[str, Any]) -> dict[str, Any]:
        asked, answer = data.turns(row)[0], data.answer_of(row)
        text = asked if isinstance(asked, str) else asked[-1]["content"]
        columns = {"question": row.get("question", text), "prompt": data.prompt_of(row, instruction, examples)}
        return columns | ({} if answer is None else {"answer": answer})

    def reference_completion(row: dict[str, Any]) -> str | None:
        return None if row.get("answer") is None else answer_completion(str(row["answer"]))

    return Task(
        name="grpo",
        instruction=instruction,
        to_row=to_row,
        grade=grade,
        held_out_split=None,
        held_out_share=data.held_out_share,
        measure="score",
        read=read,
        split_key=lambda row: words_of(row["prompt"]),
        reference_completion=reference_completion,
        answer_of=lambda text: " ".join(text.split()) or None,
    )


def from_s1k(row: dict) -> dict:
    """prompt and completion of a row of s1K as d1 fine-tunes on it: the trajectory is the reasoning, then the attempt.

    Raises KeyError for rows without `question`, `thinking_trajectories` and `attempt`.
    """
    thinking = "\n".join(row["thinking_trajectories"])
    text = f"<reasoning>\n{thinking}\n</reasoning>\n<answer>\n{row['attempt']}\n</answer>"
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": text}],
    }
