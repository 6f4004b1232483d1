"""CLIP by name: what is refused, where weights lie, and a hub on this machine that gives and lies as asked."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import torch
import transformers

from pipeline import clip
from pipeline.errors import CheckpointError, ConfigError

BIOMED = "clip:hf-hub:somebody/biomed"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Files of repositories by `owner/name/file`, served as the hub serves them; changes of its digests are lies."""
    files, lies, asked = {}, {}, []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            name = self.path[1:]
            if name not in files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = files[name]
            large = name.endswith((".safetensors", ".bin"))
            digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
            self.send_response(200)
            self.send_header("ETag", f'"{lies.get(name, digest.hexdigest())}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                asked.append(name)
                self.wfile.write(content)

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *arguments):
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repository, file: f"{address}/{repository}/{file}")
    monkeypatch.setattr("pipeline.download.ATTEMPTS", 1)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield files, lies, asked
    server.shutdown()
    thread.join()
    server.server_close()


def biomed_like(files, folder):
    """A repository like BiomedCLIP's: a transformer of timm, a BERT of transformers, its words in a file."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "photo", "of", "benign", "malignant"]
    bert = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    config = {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {
            "hf_model_name": "somebody/bert", "hf_tokenizer_name": "somebody/bert", "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12,
        },
    }  # fmt: skip
    files["somebody/bert/config.json"] = json.dumps(bert.to_dict() | {"model_type": "bert"}).encode()
    files["somebody/biomed/open_clip_config.json"] = json.dumps(
        {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    ).encode()
    files["somebody/biomed/vocab.txt"] = "\n".join(words).encode()
    files["somebody/biomed/tokenizer_config.json"] = b'{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    bert.save_pretrained(folder / "bert")
    whole = json.loads(json.dumps(config))
    whole["text_cfg"] |= {"hf_model_name": str(folder / "bert"), "hf_model_pretrained": False}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**whole).eval()
    files["somebody/biomed/open_clip_model.safetensors"] = safetensors.torch.save(model.state_dict())
    return model


def test_names_that_do_not_exist_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"There is no CLIP 'clip:ViT-B32': the nearest are clip:ViT-B-32, "):
        clip.architecture("clip:ViT-B32")
    with pytest.raises(ConfigError, match=r"no weights 'openia' for 'clip:ViT-B-32': name a file, 'none', or "):
        clip.present_weights("clip:ViT-B-32", "openia")
    with pytest.raises(CheckpointError, match=r"no file of weights at '.*nowhere.pt': check the path"):
        clip.present_weights("clip:ViT-B-32", "somewhere/nowhere.pt")
    with pytest.raises(CheckpointError, match=r"has no open_clip_config.json in 'nowhere': name a folder"):
        clip.architecture("clip:local-dir:nowhere")
    with pytest.raises(ConfigError, match="has no weights of its own"):
        clip.weights_file("clip:ViT-B-32", "own")


def test_weights_bring_their_own_activation_and_scale():
    assert "quick_gelu" not in clip.architecture("clip:ViT-B-32", "laion2b_s34b_b79k").config
    assert clip.architecture("clip:ViT-B-32", "openai").config["quick_gelu"] is True
    assert clip.architecture("clip:ViT-B-32", "openai").std == open_clip.OPENAI_DATASET_STD


def test_without_open_clip_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"needs the extra 'clip'.*slca-pipeline\[clip\]"):
        clip.architecture("clip:demo")


def test_published_weights_are_fetched_checked_and_kept(hub, tmp_path):
    files, lies, asked = hub
    repository = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")["hf_hub"].rstrip("/")
    with pytest.raises(CheckpointError, match=r"`pipeline prepare` downloads them; without a network, put the file"):
        clip.present_weights("clip:ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(CheckpointError, match=r"has none of open_clip_model.safetensors"):
        clip.download("clip:ViT-B-32", "laion2b_s34b_b79k")
    name = f"{repository}/open_clip_model.safetensors"
    files[name] = safetensors.torch.save({"x": torch.zeros(3)})
    lies[name] = "0" * 64
    with pytest.raises(CheckpointError, match="has the digest"):
        clip.download("clip:ViT-B-32", "laion2b_s34b_b79k")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    lies.clear()
    asked.clear()
    file = clip.download("clip:ViT-B-32", "laion2b_s34b_b79k")
    assert file == tmp_path / "hub" / "checkpoints" / "clip-ViT-B-32-laion2b_s34b_b79k.safetensors"
    assert file.read_bytes() == files[name]
    clip.download("clip:ViT-B-32", "laion2b_s34b_b79k")
    assert asked == [name]
    assert clip.download("clip:ViT-B-32", "none") is None


@torch.no_grad()
def test_a_model_of_the_hub_with_words_of_its_own_is_fetched_whole_and_built_without_it(hub, tmp_path, monkeypatch):
    files, _, asked = hub
    model = biomed_like(files, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no open_clip_config.json in .*`pipeline prepare` fetches it"):
        clip.architecture(BIOMED)
    clip.download(BIOMED, "own")
    asked.clear()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    wanted = clip.architecture(BIOMED, "own")
    assert (wanted.mean, wanted.image_px) == ((0.1, 0.2, 0.3), 224)
    ours = clip.build(wanted, clip.present_weights(BIOMED, "own"))
    tokens = clip.tokenizer(BIOMED)(["This is a photo of benign", "This is a photo of malignant"])
    assert tokens.shape == (2, 12)
    assert tokens[0].tolist() == [2, 5, 6, 7, 8, 9, 10, 3, 0, 0, 0, 0]
    torch.testing.assert_close(ours.encode_text(tokens), model.encode_text(tokens))
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours.encode_image(images), model.encode_image(images))
    assert str(tmp_path) not in json.dumps(wanted.of_images().config)
    assert asked == []


def test_a_small_file_of_another_digest_is_not_kept(hub, tmp_path):
    files, lies, _ = hub
    biomed_like(files, tmp_path)
    lies["somebody/biomed/vocab.txt"] = "0" * 40
    with pytest.raises(CheckpointError, match="another digest than the hub says"):
        clip.download(BIOMED, "own")
    assert not list((tmp_path / "hub").rglob("vocab.txt"))
