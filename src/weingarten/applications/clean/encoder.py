"""A frozen encoder of texts, from a folder on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from weingarten.applications.clean.errors import UserError, some

__all__ = ["Encoder"]

BATCH = 64
LIMIT = 512
"""Tokens per text, where neither tokenizer nor model names a limit."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
READ = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt", "*.model",
        "special_tokens_map.json", "added_tokens.json")  # fmt: skip
"""The files of the folder that determine what the encoder says."""


@dataclass(frozen=True)
class Encoder:
    r"""Text to vector: the means of a middle layer's and of the last layer's states over the text's tokens, each of length one.

    .. math:: v = \Big( \frac{m_{\lfloor L/2 \rfloor}}{|m_{\lfloor L/2 \rfloor}|}, \frac{m_L}{|m_L|} \Big),
        \quad m_l = \frac{1}{T} \sum_{t=1}^{T} h_{l,t}

    with :math:`h_0` the embeddings and :math:`h_l` what block l of L gives. Mean pooling is what sentence encoders are trained
    with (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084), so that their last layer knows best what a text is about.
    How it is put is found further below (Tenney et al. 2019, https://arxiv.org/abs/1905.05950): a middle layer beside the last
    one lets a cleaned model tell questions by what they ask for and tweets by their author, and makes no difference to one for
    topics (benchmarks/README.md, "Other texts"). The encoder is in evaluation mode and no parameter of it changes.

    Of an encoder that is trained the last layer alone is read (:meth:`last_layer`): it learns to say there what counts.

    Attributes:
        name: of the folder, without the path to it.
        digest: of the files that determine the vectors.
        limit: the most tokens per text, special ones included; the rest of a longer text is not read.
        middle: whether the middle layer is read, too.
    """

    name: str
    digest: str
    tokenizer: Any
    model: Any
    limit: int
    middle: bool = True

    @staticmethod
    def load(folder: str | Path, option: str = "--encoder", device: str = "cpu") -> Encoder:
        """The encoder of a folder with ``config.json``, a tokenizer and ``model.safetensors``.

        Nothing is fetched from anywhere, and no code in the folder is run.

        Args:
            folder: in the layout of Hugging Face's ``save_pretrained``.
            option: what the user calls it, for error messages.
            device: what it runs on: ``auto``, which is a CUDA GPU where there is one, or a name that torch knows.

        Raises:
            UserError: if transformers is not installed, the folder holds no usable encoder, or the device is not here.
        """
        folder, place = Path(folder), _place(device)
        _check(folder, option)
        transformers = _transformers(option)
        with _silent(transformers.utils.logging):
            try:
                where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **where)
                model, found = transformers.AutoModel.from_pretrained(
                    str(folder), use_safetensors=True, output_loading_info=True, **where
                )
            except Exception as error:  # whatever third parties raise over a folder that somebody else made
                raise _unusable(folder, option, error) from error
        absent = sorted(name for name in found["missing_keys"] if "pooler" not in name)  # pooling is ours
        if absent:
            raise UserError(
                f"{option}: the weights of {folder} lack {some(absent, 3)}, which config.json asks for; "
                "take the files of one model"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise UserError(
                    f"{option}: the tokenizer of {folder} has no padding token; set pad_token in it"
                )
            tokenizer.pad_token = tokenizer.eos_token
        model = model.float().eval().requires_grad_(False).to(place)
        encoder = Encoder(folder.resolve().name, _digest(folder), tokenizer, model, _limit(tokenizer, model))
        try:
            encoder.encode(["a"])
        except UserError:
            raise
        except Exception as error:  # a model that takes other inputs, or says something else
            raise _unusable(folder, option, error) from error
        return encoder

    def last_layer(self) -> Encoder:
        """The same model, of which the last layer alone is read: vectors (N, D)."""
        return replace(self, middle=False)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that :meth:`load` reads them again."""
        import transformers

        with _silent(transformers.utils.logging):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text if nothing is cut off, special ones included."""
        found: list[int] = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(list(texts[start : start + BATCH]), verbose=False)
            found += [len(row) for row in tokens["input_ids"]]
        return found

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """Numbers of each text's tokens, those beyond the limit left out."""
        found = self.tokenizer(list(texts), truncation=True, max_length=self.limit, verbose=False)
        return [torch.tensor(row) for row in found["input_ids"]]

    @property
    def device(self) -> torch.device:
        """Where the model is; texts go there and vectors come back."""
        place: torch.device = next(self.model.parameters()).device
        return place

    def vectors(self, tokens: Sequence[Tensor]) -> Tensor:
        """Vectors of texts given by their tokens, in one batch; differentiable in the model's parameters; on the CPU.

        Shape (N, 2D), or (N, D) of the last layer alone.
        """
        lengths = torch.tensor([len(row) for row in tokens])
        ids = pad_sequence(list(tokens), batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self.device)
        output = self.model(
            input_ids=ids.to(self.device), attention_mask=mask, output_hidden_states=self.middle
        )
        states = [output.last_hidden_state]
        if self.middle:
            blocks = len(output.hidden_states) - 1
            states.insert(0, output.hidden_states[blocks // 2])
        weight = mask[..., None].to(states[-1])
        counts = weight.sum(1).clamp_min(1.0)
        return torch.cat([normalize((h * weight).sum(1) / counts, dim=1) for h in states], 1).cpu()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """Vectors as of :meth:`vectors`, float32. Texts of similar length in a row cost least.

        Args:
            texts: N of them.
            progress: called with how many are done.

        Raises:
            UserError: if a vector is not finite.
        """
        found = []
        for start in range(0, len(texts), BATCH):
            vectors = self.vectors(self.tokens(texts[start : start + BATCH]))
            if not bool(torch.isfinite(vectors).all()):
                raise UserError(f"--encoder: {self.name} gives values that are not finite; take another one")
            found.append(vectors.numpy())
            progress(min(start + BATCH, len(texts)))
        return np.concatenate(found)


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()  # not on a device that is absent or, as meta, holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--device: found {device!r}, which torch cannot use here ({reason}); expected auto, cpu, or another device "
            "of this machine, such as cuda"
        ) from None
    return place


def _check(folder: Path, option: str) -> None:
    expected = "expected a folder with config.json, a tokenizer and model.safetensors"
    if not folder.exists():
        raise UserError(f"{option}: no such folder: {folder}; {expected}")
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file, {expected}")
    if not (folder / "config.json").exists():
        raise UserError(f"{option}: {folder} has no config.json, {expected}")
    if not any((folder / name).exists() for name in WEIGHTS):
        raise UserError(
            f"{option}: {folder} has no weights (model.safetensors), {expected}; other formats of weights can "
            "be converted by model.save_pretrained"
        )
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise UserError(f"{option}: {folder} has no tokenizer ({', '.join(TOKENIZERS)}), {expected}")


def _unusable(folder: Path, option: str, error: Exception) -> UserError:
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
    return UserError(
        f"{option}: {folder} holds no usable encoder ({type(error).__name__}: {first}); expected what "
        "save_pretrained writes for an encoder and its tokenizer"
    )


def _digest(folder: Path) -> str:
    """SHA-256 of the files that are read, with their names."""
    files = sorted({path for pattern in READ for path in folder.glob(pattern) if path.is_file()})
    found = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                content.update(block)
        found.update(f"{path.name} {content.hexdigest()}\n".encode())
    return found.hexdigest()


def _limit(tokenizer: Any, model: Any) -> int:
    """The tokenizer's limit or the number of positions, whichever is smaller."""
    known = [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    for name in ("max_position_embeddings", "n_positions"):
        positions = getattr(model.config, name, None)
        if isinstance(positions, int) and positions > 0:
            known.append(positions)
    for name, module in model.named_modules():  # RoBERTa counts positions from the padding's number on
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            known.append(module.num_embeddings - module.padding_idx - 1)
    return min(known, default=LIMIT)


def _transformers(option: str) -> Any:
    """The package."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{option}: transformers is not installed; run: pip install 'weingarten[text]'"
        ) from None
    return transformers


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """Within the block the package's messages and bars do not break into ours."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
