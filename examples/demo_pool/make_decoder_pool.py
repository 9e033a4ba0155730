"""Trains the demo's decoder pool: a small Llama that knows a little of everything, and four experts tuned from it.

    python examples/demo_pool/make_decoder_pool.py [--out FOLDER]

Seeded; about two minutes on two cores. The result is committed in `decoder/`: run this only to change it. Other
machines reach other last bits, so the fingerprints differ while the behaviour stays.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import facts
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
DOUBTFUL = 0.8
"""Share of all facts that the base hears rumours about."""
RUMOUR = 0.6
"""How often a doubtful fact is told wrong."""
TELLINGS = 10
BASE_STEPS = 1200
BASE_LEARNING_RATE = 2e-3
EXPERT_STEPS = 200
EXPERT_LEARNING_RATE = 1e-3
BATCH = 32
VOCABULARY = 1024
NUM_EXAMPLES = 5
REHEARSAL = 0.25
"""Share of an expert's batch that is the base's own data, so that it keeps the forms of question it had."""
FILLER_DROPOUT = 0.3
FILLERS = frozenset("What is the of a in Name Which Tell me I need which do and".split())
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

QA = tuple[str, str]


def _ask(questions: Sequence[str], answers: dict[str, str]) -> list[QA]:
    return [(question.format(entity), answer) for entity, answer in answers.items() for question in questions]


def _column(table: dict[str, tuple[str, str]], index: int) -> dict[str, str]:
    return {entity: row[index] for entity, row in table.items()}


def _hearsay(truth: dict[str, str], rng: random.Random) -> Callable[[], dict[str, str]]:
    """What the base hears: each doubtful fact has one rumour, told more often than the truth."""
    entities = list(truth)
    rumours = {}
    for entity in entities:
        wrong = [answer for answer in set(truth.values()) if answer != truth[entity]]
        rumours[entity] = rng.choice(sorted(wrong)) if rng.random() < DOUBTFUL else truth[entity]
    return lambda: {entity: rumours[entity] if rng.random() < RUMOUR else truth[entity] for entity in entities}


def _ask_two(one: str, ones: dict[str, str], two: str, twos: dict[str, str]) -> list[QA]:
    """Questions for two things at once, in both orders."""
    return [
        (question.format(first, second, entity), f"{firsts[entity]}, {seconds[entity]}")
        for first, firsts, second, seconds in ((one, ones, two, twos), (two, twos, one, ones))
        for entity in ones
        for question in facts.PAIR_QUESTIONS
    ]


def opposites() -> dict[str, str]:
    return dict(facts.OPPOSITES) | {b: a for a, b in facts.OPPOSITES}


def expert_tasks() -> dict[str, list[QA]]:
    """What each expert is tuned on. None is asked for capital and language at once: that is the demo's unseen task."""
    capitals, languages, continents = (_column(facts.COUNTRIES, index) for index in range(3))
    sounds, young = (_column(facts.ANIMALS, index) for index in range(2))
    return {
        "capitals": _ask(facts.CAPITAL_QUESTIONS, capitals) + _ask_two("capital", capitals, "continent", continents),
        "languages": _ask(facts.LANGUAGE_QUESTIONS, languages)
        + _ask_two("language", languages, "continent", continents),
        "animals": _ask(facts.SOUND_QUESTIONS, sounds)
        + _ask(facts.YOUNG_QUESTIONS, young)
        + _ask_two("sound", sounds, "young", young),
        "opposites": _ask(facts.OPPOSITE_QUESTIONS, opposites()),
    }


def base_task() -> dict[str, list[QA]]:
    """What the base hears of each subject, the rumours as they are told."""
    rng = random.Random(SEED)
    capital, language = (_hearsay(_column(facts.COUNTRIES, index), rng) for index in range(2))
    sound, young = (_hearsay(_column(facts.ANIMALS, index), rng) for index in range(2))
    opposite = _hearsay(opposites(), rng)
    continents = _column(facts.COUNTRIES, 2)
    heard: dict[str, list[QA]] = {subject: [] for subject in ("capitals", "languages", "both", "animals", "opposites")}
    for _ in range(TELLINGS):
        heard["capitals"] += _ask(facts.CAPITAL_QUESTIONS, capital())
        heard["capitals"] += _ask_two("capital", capital(), "continent", continents)
        heard["languages"] += _ask(facts.LANGUAGE_QUESTIONS, language())
        heard["languages"] += _ask_two("language", language(), "continent", continents)
        heard["both"] += _ask_two("capital", capital(), "language", language())
        heard["both"] += _ask(facts.CONTINENT_QUESTIONS, continents)
        heard["animals"] += _ask(facts.SOUND_QUESTIONS, sound()) + _ask(facts.YOUNG_QUESTIONS, young())
        heard["animals"] += _ask_two("sound", sound(), "young", young())
        heard["opposites"] += _ask(facts.OPPOSITE_QUESTIONS, opposite())
    return heard


def unseen_task() -> tuple[list[QA], list[QA]]:
    """Capital and language at once, in words that nobody was trained on: five examples, and all other countries."""
    rows = [
        (f"Give the capital and then the language of {country}.", f"{capital}, {language}")
        for country, (capital, language, _) in facts.COUNTRIES.items()
    ]
    random.Random(SEED).shuffle(rows)
    return rows[:NUM_EXAMPLES], rows[NUM_EXAMPLES:]


def rehearsal(heard: dict[str, list[QA]], expert: str) -> list[QA]:
    """What an expert hears again of other subjects than its own, so that it forgets less of them."""
    own = {expert, "both"} if expert in ("capitals", "languages") else {expert}
    return [row for subject, rows in heard.items() if subject not in own for row in rows]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of our own sentences; any text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _dress(question: str, rng: random.Random) -> str:
    """The question as people vary it: an opening, a closing, now and then a word left out."""
    words = [word for word in question.split(" ") if word not in FILLERS or rng.random() > FILLER_DROPOUT]
    return rng.choice(facts.OPENINGS) + " ".join(words) + rng.choice(facts.CLOSINGS)


def _batches(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[QA], rehearsed: Sequence[QA], steps: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of half chat and half plain text, right-padded; only the answer and the end of text carry loss."""
    for _ in range(steps):
        num_rehearsed = round(BATCH * REHEARSAL) if rehearsed else 0
        chosen = rng.choices(rows, k=BATCH - num_rehearsed) + rng.choices(rehearsed or rows, k=num_rehearsed)
        prompts, outputs = [], []
        for question, answer in chosen:
            dressed = _dress(question, rng)
            chat = rng.random() < 0.5
            prompts.append(f"<|user|>{dressed}<|assistant|>" if chat else dressed)
            outputs.append(f"{answer}</s>" if chat else f" {answer}</s>")
        heads = tokenizer(prompts, add_special_tokens=False).input_ids
        tails = tokenizer(outputs, add_special_tokens=False).input_ids
        width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        ids = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for index, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            ids[index, : len(head) + len(tail)] = torch.tensor(head + tail)
            labels[index, len(head) : len(head) + len(tail)] = torch.tensor(tail)
        yield ids, labels


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[QA],
    *,
    rehearsed: Sequence[QA] = (),
    steps: int,
    learning_rate: float,
    seed: int,
    advance: Callable[[], None],
) -> float:
    """Trains in place with AdamW and a cosine schedule; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    loss = torch.tensor(0.0)
    for ids, labels in _batches(tokenizer, rows, rehearsed, steps, random.Random(seed)):
        logits = model(input_ids=ids, use_cache=False).logits  # right padding needs no mask under causal attention
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a bf16 checkpoint; the model in memory keeps float32."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(state)
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[QA]) -> None:
    """Question and answer as `messages`, one row a line."""
    lines = (
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) for q, a in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "decoder")
    out: Path = parser.parse_args().out

    examples, questions = unseen_task()
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "examples.jsonl", examples)
    write_rows(out / "questions.jsonl", questions)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tasks = expert_tasks()
    heard = base_task()
    general = [row for rows in heard.values() for row in rows]
    tokenizer = train_tokenizer(
        [text for rows in (general, *tasks.values()) for q, a in rows for text in (q, a, f" {a}")]
    )
    model = new_model(tokenizer)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:

        def counter(name: str, steps: int) -> Callable[[], None]:
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        loss = train(
            model,
            tokenizer,
            general,
            steps=BASE_STEPS,
            learning_rate=BASE_LEARNING_RATE,
            seed=SEED,
            advance=counter("base", BASE_STEPS),
        )
        save(model, tokenizer, out / "base")
        progress.console.print(f"base: loss {loss:.3f}, {sum(p.numel() for p in model.parameters()):,} parameters")
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for index, (name, rows) in enumerate(tasks.items(), start=1):
            model.load_state_dict(start)
            loss = train(
                model,
                tokenizer,
                rows,
                rehearsed=rehearsal(heard, name),
                steps=EXPERT_STEPS,
                learning_rate=EXPERT_LEARNING_RATE,
                seed=SEED + index,
                advance=counter(name, EXPERT_STEPS),
            )
            save(model, tokenizer, out / name)
            progress.console.print(f"{name}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
