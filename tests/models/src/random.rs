//! Llama-shaped models with random weights: the same seed gives the same bytes, at any size.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::gguf_writer::{Header, Value, write_padding};
use crate::quant::TensorType;
use crate::rng::Rng;
use crate::vocab;

/// The template of every model of this crate: each message's text and a line end.
pub const CHAT_TEMPLATE: &str = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}";

/// The shape of a random model. [`RandomLlama::default`] is a tiny one that runs anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RandomLlama {
    /// Everything random follows from it.
    pub seed: u64,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream. K-quants need a multiple of 256.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the feed-forward part. K-quants need a multiple of 256.
    pub ffn: usize,
    /// Tokens; at least 259 (two control tokens, 256 bytes, one merged pair).
    pub vocab: usize,
    /// The longest context the metadata allows.
    pub context: usize,
    /// The format of the matrices; norms are always F32.
    pub tensor_type: TensorType,
    /// Whether the output head is the embedding, with no tensor of its own.
    pub tied: bool,
}

impl RandomLlama {
    /// Over 100 million weights: one step of it is work for every core.
    pub const LARGE: Self = Self {
        seed: 1,
        layers: 8,
        hidden: 1024,
        heads: 16,
        kv_heads: 4,
        head_dim: 64,
        ffn: 3072,
        vocab: 8192,
        context: 4096,
        tensor_type: TensorType::Q8_0,
        tied: false,
    };
}

impl Default for RandomLlama {
    fn default() -> Self {
        Self {
            seed: 1,
            layers: 2,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            ffn: 256,
            vocab: 288,
            context: 256,
            tensor_type: TensorType::Q8_0,
            tied: false,
        }
    }
}

/// The model as GGUF bytes.
pub fn random_llama(shape: &RandomLlama) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing into memory cannot fail.
    let _ = shape.write(&mut out);
    out
}

impl RandomLlama {
    /// Writes the model to a file, holding one tensor row at a time, so that size costs only disk.
    pub fn write_to(&self, path: &Path) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        self.write(&mut out)?;
        out.flush()
    }

    /// The number of weights.
    pub fn weights(&self) -> usize {
        self.tensors()
            .iter()
            .map(|tensor| tensor.1.iter().product::<usize>())
            .sum()
    }

    /// Names and dimensions (length of a row first) in file order.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut list = vec![("token_embd.weight".to_owned(), vec![self.hidden, self.vocab])];
        for layer in 0..self.layers {
            let parts = [
                ("attn_norm", vec![self.hidden]),
                ("attn_q", vec![self.hidden, q]),
                ("attn_k", vec![self.hidden, kv]),
                ("attn_v", vec![self.hidden, kv]),
                ("attn_output", vec![q, self.hidden]),
                ("ffn_norm", vec![self.hidden]),
                ("ffn_gate", vec![self.hidden, self.ffn]),
                ("ffn_up", vec![self.hidden, self.ffn]),
                ("ffn_down", vec![self.ffn, self.hidden]),
            ];
            list.extend(parts.map(|(name, dims)| (format!("blk.{layer}.{name}.weight"), dims)));
        }
        list.push(("output_norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            list.push(("output.weight".to_owned(), vec![self.hidden, self.vocab]));
        }
        list
    }

    /// The header: metadata, tokenizer, and where each tensor lies.
    pub fn header(&self) -> Header {
        let mut header = Header::default();
        header.set("general.architecture", "llama");
        header.set("general.name", format!("random-llama-{}", self.seed));
        header.set("general.license", "Apache-2.0");
        let llama = LlamaKeys {
            layers: self.layers,
            context: self.context,
            hidden: self.hidden,
            ffn: self.ffn,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab: self.vocab,
        };
        llama.set(&mut header, self.tensor_type);
        let mut tokens = vec!["<s>".to_owned(), "</s>".to_owned()];
        tokens.extend((0..=255).map(|byte| vocab::byte_symbol(byte).to_string()));
        tokens.push("th".to_owned());
        // Filler stays out of the way: it can be generated but no text is encoded to it.
        tokens.extend((tokens.len()..self.vocab).map(|id| format!("[{id}]")));
        tokens.truncate(self.vocab);
        set_tokenizer(&mut header, tokens, "t h");
        for (name, dims) in self.tensors() {
            header.add_tensor(&name, &dims, kind_of(&dims, self.tensor_type));
        }
        header
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.header().to_bytes())?;
        for (index, (_, dims)) in self.tensors().into_iter().enumerate() {
            let row = dims.first().copied().unwrap_or(0);
            let rows = dims.get(1).copied().unwrap_or(1);
            let kind = kind_of(&dims, self.tensor_type);
            let mut rng = Rng::part(self.seed, u64::try_from(index).unwrap_or(0));
            let spread = 1.0 / f32::from(u16::try_from(row.max(1)).unwrap_or(u16::MAX)).sqrt();
            let (mut weights, mut bytes) = (vec![0.0; row], Vec::new());
            let mut written = 0;
            for _ in 0..rows {
                bytes.clear();
                if dims.len() == 1 {
                    weights.fill(1.0);
                } else {
                    weights.fill_with(|| rng.normal() * spread);
                }
                kind.quantize(&weights, &mut bytes);
                out.write_all(&bytes)?;
                written += bytes.len();
            }
            write_padding(out, written)?;
        }
        Ok(())
    }
}

/// Norms (one dimension) are always F32: engines add and multiply with them directly.
pub fn kind_of(dims: &[usize], kind: TensorType) -> TensorType {
    if dims.len() == 1 { TensorType::F32 } else { kind }
}

/// The sizes behind the `llama.*` keys.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names are those of RandomLlama")]
pub struct LlamaKeys {
    pub layers: usize,
    pub context: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
}

impl LlamaKeys {
    /// Sets them, and the file's main number format.
    pub fn set(&self, header: &mut Header, kind: TensorType) {
        let number = |x: usize| Value::U32(u32::try_from(x).unwrap_or(u32::MAX));
        header.set("general.alignment", 32_u32);
        header.set("general.file_type", kind.file_type());
        header.set("general.quantization_version", 2_u32);
        header.set("llama.block_count", number(self.layers));
        header.set("llama.context_length", number(self.context));
        header.set("llama.embedding_length", number(self.hidden));
        header.set("llama.feed_forward_length", number(self.ffn));
        header.set("llama.attention.head_count", number(self.heads));
        header.set("llama.attention.head_count_kv", number(self.kv_heads));
        header.set("llama.attention.key_length", number(self.head_dim));
        header.set("llama.attention.value_length", number(self.head_dim));
        header.set("llama.attention.layer_norm_rms_epsilon", 1e-5_f32);
        header.set("llama.rope.dimension_count", number(self.head_dim));
        header.set("llama.rope.freq_base", 10_000.0_f32);
        header.set("llama.vocab_size", number(self.vocab));
    }
}

/// Sets a byte-level BPE tokenizer whose tokens 0 and 1 are BOS and EOS, and the chat template.
pub fn set_tokenizer(header: &mut Header, tokens: Vec<String>, merge: &str) {
    header.set("tokenizer.ggml.model", "gpt2");
    header.set("tokenizer.ggml.pre", "llama3");
    // A whole word in the vocabulary is one token, merges or not.
    header.set("tokenizer.ggml.ignore_merges", true);
    header.set(
        "tokenizer.ggml.token_type",
        Value::i32s(vocab::token_types(tokens.len())),
    );
    header.set("tokenizer.ggml.tokens", Value::strings(tokens));
    header.set("tokenizer.ggml.merges", Value::strings([merge]));
    header.set("tokenizer.ggml.bos_token_id", vocab::BOS);
    header.set("tokenizer.ggml.eos_token_id", vocab::EOS);
    header.set("tokenizer.ggml.add_bos_token", true);
    header.set("tokenizer.ggml.add_eos_token", false);
    header.set("tokenizer.chat_template", CHAT_TEMPLATE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_does_not() {
        let shape = RandomLlama::default();
        assert_eq!(random_llama(&shape), random_llama(&shape));
        assert_ne!(
            random_llama(&shape),
            random_llama(&RandomLlama {
                seed: 2,
                ..shape.clone()
            })
        );
    }
}
