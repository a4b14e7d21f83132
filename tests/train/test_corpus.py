"""Shards, splits and prompts."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from sglang_dflash.cli.data import features_place
from sglang_dflash.errors import UserError
from sglang_dflash.platform.capability import multiplies_bf16
from sglang_dflash.train import corpus
from sglang_dflash.train import target as target_module
from sglang_dflash.train.batches import excluded_hashes, load_documents
from sglang_dflash.train.chat import Chat
from sglang_dflash.train.collect import Collector, Settings
from sglang_dflash.train.corpus import Record
from sglang_dflash.train.features import FeatureWriter
from sglang_dflash.train.generate import Generator, Job
from sglang_dflash.train.given import read_dataset, read_prompts
from sglang_dflash.train.prompts import clean_turn, is_held_out, openers, prompt_hash
from sglang_dflash.train.target import fast_dtype

LAYERS = (0, 2, 4)


def hashes(held_out: bool, n: int) -> list[int]:
    return [h for h in range(1, 5000) if is_held_out(h) == held_out][:n]


def records(held_out: bool, n: int = 3) -> list[Record]:
    return [Record(list(range(5, 20 + i)), 4, "code", 0.0, h) for i, h in enumerate(hashes(held_out, n))]


def test_shard_round_trip(tmp_path):
    corpus.write_shard(tmp_path / "train-00000.npz", records(False), 49152)
    shard = corpus.read_shard(tmp_path / "train-00000.npz")
    assert shard.tokens.dtype == "uint16"
    assert len(shard) == 3
    assert shard.response_tokens == 11 + 12 + 13
    corpus.write_shard(tmp_path / "train-00001.npz", records(False), 151936)
    assert corpus.read_shard(tmp_path / "train-00001.npz").tokens.dtype == "uint32"


def test_shard_cut_short(tmp_path):
    path = tmp_path / "train-00000.npz"
    corpus.write_shard(path, records(False), 49152)
    for keep in (10, path.stat().st_size // 2, path.stat().st_size - 5):
        corpus.write_shard(path, records(False), 49152)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match=r"damaged|cut short"):
            corpus.read_shard(path)


def test_held_out_prompts_cannot_be_renamed_into_training(tmp_path):
    path = tmp_path / "heldout-00000.npz"
    corpus.write_shard(path, records(True), 49152)
    assert len(corpus.read_shard(path)) == 3
    path.rename(tmp_path / "train-00000.npz")
    with pytest.raises(UserError, match="another split"):
        corpus.read_shard(tmp_path / "train-00000.npz")


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        corpus.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_prompt_hash_ignores_trifles():
    assert prompt_hash("Write a loop.") == prompt_hash("  write A loop ")
    assert prompt_hash("Write a loop.") != prompt_hash("Write a loop in C.")
    share = sum(is_held_out(prompt_hash(f"prompt {i}")) for i in range(5000)) / 5000
    assert 0.03 < share < 0.05


@pytest.mark.parametrize(
    ("text", "finished", "want"),
    [
        ("Explain how a cat sleeps.", True, "Explain how a cat sleeps."),
        ("Explain how cats sleep. And then the", False, "Explain how cats sleep."),
        ("Explain how cats and then the", False, None),
        ("Too short", True, None),
        ("Fix this code:\n```\nx = 1", True, "Fix this code:\n```\nx = 1\n```"),
        ("A turn with <|im_start|> in it", True, None),
    ],
)
def test_clean_turn(text, finished, want):
    assert clean_turn(text, finished) == want


def test_openers_are_repeatable_and_mixed():
    first = [o for o, _ in zip(openers(3), range(400), strict=False)]
    assert first == [o for o, _ in zip(openers(3), range(400), strict=False)]
    share = sum(o.kind == "code" for o in first) / 400
    assert 0.3 < share < 0.5
    assert len({o.kind for o in first}) == 8


def test_prompt_files(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "one two"},
        {"messages": [{"role": "user", "content": "three"}]},
        {"kind": "code", "prompt": "x"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [t for _, t in read_prompts(file)] == ["one two", "three", "x"]
    assert excluded_hashes([file]) == {prompt_hash(t) for t in ("one two", "three", "x")}
    file.write_text('{"answer": 3}\n')
    with pytest.raises(UserError, match="no usable turn"):
        list(read_prompts(file))
    file.write_text("{broken\n")
    with pytest.raises(UserError, match=r"p\.jsonl:1 is not JSON"):
        list(read_prompts(file))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"prompt": "a"},\n {"prompt": "b"}]', ["a", "b"]),
        ('[{"prompt": "a"}, {"prompt": "b"}]\n', ["a", "b"]),
        ('\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ('{"prompt": "a\u2028b\x0bc\x85d"}\n'.replace("\x0b", "\\u000b"), ["a\u2028b\x0bc\x85d"]),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}', ["a\nb"]),
        ('{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}', ["a"]),
        ('{"messages": ["a", "answer"]}\n{"conversations": "b"}', ["a", "b"]),
    ],
)
def test_prompt_files_as_other_tools_write_them(tmp_path, content, texts):
    file = tmp_path / "p.json"
    file.write_bytes(content.encode())
    assert [t for _, t in read_prompts(file)] == texts
    assert excluded_hashes([file]) == {prompt_hash(t) for t in texts}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "caf\xe9"}'.encode("latin-1"), r"p\.jsonl:2 is not UTF-8"),
        ('[{"prompt": "a"},\n {"prompt": "caf\xe9"}]'.encode("latin-1"), r"p\.jsonl:2 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), r"p\.jsonl:1 is not UTF-8"),
        (b'[{"prompt": "a"},\n {"prompt": "b"\n]', r"p\.jsonl:3 is not JSON"),
        (b'{"prompt": "a"}\n\n{broken\n', r"p\.jsonl:3 is not JSON"),
        (
            b'["a", 7, {"prompt": " "}, {"messages": []}]',
            "2 no object, 1 without text, 1 without a user turn",
        ),
        (b"", "no rows"),
    ],
)
def test_prompt_files_that_cannot_be_read_are_one_line(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_prompts(file))


def test_rows_left_out_are_counted(tmp_path, target, target_dir, caplog):
    """By reason, and told: rows without a prompt, those too long, doubles, and answers too short."""
    file = tmp_path / "p.jsonl"
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    rows = [{"prompt": "one two"}, {"prompt": "one  two"}, {"answer": 3}, image, {"prompt": "x " * 400}]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = Settings(out=tmp_path / "c", response_tokens=500, prompts=file, max_new=4)
    collector = Collector(target, Chat(target_dir), settings)
    with caplog.at_level("INFO", "sglang_dflash.data"):
        collector.run(lambda progress: None)
    assert dict(collector.left_out) == {
        "without a user turn": 1,
        "without text": 1,
        "already answered, given twice or excluded": 1,
        "longer than 120 tokens": 1,
        "answered in fewer than 8 tokens": 1,
    }
    assert "left out: 1 already answered, given twice or excluded, 1 without a user turn" in caplog.text


def test_batched_decoding_is_greedy_decoding(target):
    """Many slots, refills and shared groups give what one plain forward at a time gives."""
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 320, (3 + i % 5,), generator=rng).tolist() for i in range(11)]
    jobs = [Job(p, 0.0, 9 + i % 4, i) for i, p in enumerate(prompts)]
    waiting = list(jobs)

    def source(n):
        taken, waiting[:] = waiting[:n], waiting[n:]
        return taken

    generator = Generator(
        target, {2}, groups=2, width=3, max_len=40, features=LAYERS, planes_dtype=torch.float32
    )
    done = {d.job.tag: d for d in generator.run(source)}
    assert sorted(done) == list(range(11))
    for i, job in enumerate(jobs):
        tokens = list(job.prompt)
        while len(tokens) - len(job.prompt) < job.max_new and tokens[-1] != 2:
            last = target.prefill(torch.tensor([tokens]))[0, -1, -1]
            tokens.append(int((target.head @ last).argmax()))
        assert done[i].tokens == tokens
        planes = target.prefill(torch.tensor([tokens]), LAYERS)[0]
        torch.testing.assert_close(done[i].planes[:-1], planes[:-1], atol=1e-4, rtol=1e-3)


def test_collect_resumes_and_never_mixes_splits(tmp_path, target, target_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say the number {i} again"}) for i in range(90)))
    barred = tmp_path / "barred.jsonl"
    barred.write_text(json.dumps({"prompt": "say the number 7 again"}))

    def run(tokens):
        settings = Settings(
            out=tmp_path / "c", response_tokens=tokens, max_new=16, records_per_shard=8, groups=2, width=4,
            prompts=prompts, exclude=[barred], features=LAYERS, features_dir=tmp_path / "f",
        )  # fmt: skip
        collector = Collector(target, Chat(target_dir), settings)
        collector.run(lambda progress: None)

    run(150)
    first = corpus.shard_paths(tmp_path / "c", "train")
    before = [p.read_bytes() for p in first]
    run(700)
    shards = corpus.load_split([tmp_path / "c"], "train")
    assert [p.read_bytes() for p in first] == before
    assert len(shards) > len(first)
    seen = [int(h) for s in shards for h in s.hash]
    assert len(seen) == len(set(seen))
    assert prompt_hash("say the number 7 again") not in seen
    assert not any(is_held_out(h) for h in seen)
    # Features kept while decoding are those of a prefill.
    writer = FeatureWriter(tmp_path / "f", target, LAYERS)
    kept = writer.open(shards[0]).clone()
    (tmp_path / "f" / "train-00000.bf16").unlink()
    again = writer.open(shards[0])
    ends = torch.tensor(shards[0].offsets[1:] - 1)
    for planes in (kept, again):
        planes[ends.long()] = 0
    assert (kept.float() - again.float()).abs().mean() < 0.01 * again.float().abs().mean()
    assert load_documents([tmp_path / "c"], "train", writer, limit=2)


def test_datasets(tmp_path):
    rows = [
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": f"q {i}"}]}
        for i in range(3)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    assert [t for _, t in read_dataset(str(tmp_path / "d"), "train")] == ["q 0", "q 1", "q 2"]
    both = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"prompt": "p", "kind": "code"}])})
    both.save_to_disk(tmp_path / "e")
    assert list(read_dataset(str(tmp_path / "e"), "test")) == [("code", "p")]
    with pytest.raises(UserError, match="split train"):
        list(read_dataset(str(tmp_path / "e"), "train"))
    datasets.Dataset.from_list([{"answer": "a"}]).save_to_disk(tmp_path / "f")
    with pytest.raises(UserError, match=r"1 without a user turn.*its columns are answer"):
        list(read_dataset(str(tmp_path / "f"), "train"))


def test_collect_ends_with_its_minutes(tmp_path, target, target_dir):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say the number {i} again"}) for i in range(90)))
    settings = Settings(
        out=tmp_path / "c", response_tokens=10**6, minutes=5, max_new=16, groups=2, width=4, prompts=prompts
    )
    seconds = iter(range(0, 10**6, 20))  # 20 s between two looks at the clock
    Collector(target, Chat(target_dir), settings).run(lambda progress: None, lambda: next(seconds))
    answers = sum(len(s) for s in corpus.load_split([tmp_path / "c"], "train"))
    assert 8 <= answers < 60


def test_features_of_another_choice_are_not_mixed(tmp_path, target):
    FeatureWriter(tmp_path, target, (0, 2))
    with pytest.raises(UserError, match="--features-dir"):
        FeatureWriter(tmp_path, target, (0, 3))


def test_stop_and_mask_tokens(target_dir):
    chat = Chat(target_dir)
    assert chat.stop_ids() == {2}
    assert chat.mask_token() == (3, "<empty_output>")


def test_no_mask_token_is_named(target_dir, tmp_path):
    for file in target_dir.iterdir():
        text = file.read_text() if file.suffix == ".json" else None
        if text is not None:
            (tmp_path / file.name).write_text(text.replace("<empty_output>", "<plain_word>"))
        elif file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="--mask-token-id"):
        Chat(tmp_path).mask_token()


@pytest.mark.parametrize(("flags", "fast"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False)])
def test_dtype_follows_the_processor(monkeypatch, flags, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(target_module, "multiplies_bf16", multiplies_bf16.__wrapped__)
    assert fast_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)
    assert fast_dtype("cuda:0") == torch.bfloat16


def test_features_of_two_corpora_lie_apart(tmp_path):
    a, b = Path("x/a"), Path("x/b")
    assert features_place(tmp_path, [a], a) == tmp_path
    assert features_place(tmp_path, [a, b], a) != features_place(tmp_path, [a, b], b)
    assert features_place(None, [a, b], b).name == "b"


def test_training_does_not_import_sglang():
    names = ", ".join(f"sglang_dflash.train.{name}" for name in ("trainer", "collect", "served", "judge"))
    code = f"import sys, {names}; sys.exit('sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
