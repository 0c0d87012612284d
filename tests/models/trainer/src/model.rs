//! The llama-shaped model: its sizes, its weights (stored as [in, out]) and its forward pass.

use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use gogrid_testmodels::rng::Rng;

use crate::data::Batch;
use crate::ops::{Attention, RmsNorm, SwiGlu};

pub const LAYERS: usize = 2;
pub const HIDDEN: usize = 256;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 64;
pub const FFN: usize = 512;
pub const CONTEXT: usize = 128;
pub const ROPE_BASE: f32 = 10_000.0;
pub const EPSILON: f32 = 1e-5;
/// Width of queries, keys and values side by side.
pub const QKV: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

/// Indices of one layer's weights in [`Model::vars`].
const NORM_1: usize = 0;
const W_QKV: usize = 1;
const W_OUT: usize = 2;
const NORM_2: usize = 3;
const W_GATE_UP: usize = 4;
const W_DOWN: usize = 5;
const PER_LAYER: usize = 6;

pub struct Model {
    /// Embedding, the layers' weights, final norm, head.
    pub vars: Vec<Var>,
}

impl Model {
    /// Random weights: 1/√in, the two outputs of a layer smaller so that the residual stream stays even.
    pub fn random(seed: u64, vocab: usize) -> Result<Self> {
        let mut shapes = vec![(vec![vocab, HIDDEN], 0.5)];
        let input = 1.0 / (HIDDEN as f32).sqrt();
        let output = 1.0 / ((2 * LAYERS) as f32).sqrt();
        for _ in 0..LAYERS {
            shapes.push((vec![HIDDEN], 0.0));
            shapes.push((vec![HIDDEN, QKV], input));
            shapes.push((vec![HIDDEN, HIDDEN], input * output));
            shapes.push((vec![HIDDEN], 0.0));
            shapes.push((vec![HIDDEN, 2 * FFN], input));
            shapes.push((vec![FFN, HIDDEN], output / (FFN as f32).sqrt()));
        }
        shapes.push((vec![HIDDEN], 0.0));
        shapes.push((vec![HIDDEN, vocab], 0.02));
        let vars = shapes.into_iter().enumerate().map(|(index, (shape, spread))| {
            let mut rng = Rng::part(seed, index as u64);
            let count = shape.iter().product();
            let data: Vec<f32> = (0..count)
                .map(|_| {
                    if shape.len() == 1 {
                        1.0
                    } else {
                        rng.normal() * spread
                    }
                })
                .collect();
            Ok(Var::from_tensor(&Tensor::from_vec(data, shape, &Device::Cpu)?)?)
        });
        Ok(Self {
            vars: vars.collect::<Result<_>>()?,
        })
    }

    fn layer(&self, layer: usize, index: usize) -> &Tensor {
        self.vars[1 + layer * PER_LAYER + index].as_tensor()
    }

    fn end(&self, index: usize) -> &Tensor {
        self.vars[1 + LAYERS * PER_LAYER + index].as_tensor()
    }

    /// Logits at the batch's answer positions only: after the last attention no other row is needed.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut x = self.vars[0].index_select(&batch.tokens, 0)?;
        for layer in 0..LAYERS {
            let weight = |index| self.layer(layer, index);
            let attention = Attention {
                starts: Arc::clone(&batch.starts),
            };
            let mut mixed = x
                .apply_op2(weight(NORM_1), RmsNorm)?
                .matmul(weight(W_QKV))?
                .apply_op1(attention)?;
            if layer + 1 == LAYERS {
                mixed = mixed.index_select(&batch.asked, 0)?;
                x = x.index_select(&batch.asked, 0)?;
            }
            x = (x + mixed.matmul(weight(W_OUT))?)?;
            let inner = x
                .apply_op2(weight(NORM_2), RmsNorm)?
                .matmul(weight(W_GATE_UP))?
                .apply_op1(SwiGlu)?;
            x = (x + inner.matmul(weight(W_DOWN))?)?;
        }
        Ok(x.apply_op2(self.end(0), RmsNorm)?.matmul(self.end(1))?)
    }

    /// The weights under their GGUF names, transposed to [out, in], the fused ones taken apart.
    pub fn named(&self) -> Result<Vec<(String, Tensor)>> {
        let mut named = vec![("token_embd.weight".to_owned(), self.vars[0].as_tensor().clone())];
        let kv = KV_HEADS * HEAD_DIM;
        for layer in 0..LAYERS {
            let mut put =
                |name: &str, tensor: Tensor| named.push((format!("blk.{layer}.{name}.weight"), tensor));
            let part = |index, from, width| -> Result<Tensor> {
                Ok(self
                    .layer(layer, index)
                    .narrow(1, from, width)?
                    .t()?
                    .contiguous()?)
            };
            put("attn_norm", self.layer(layer, NORM_1).clone());
            put("attn_q", part(W_QKV, 0, HIDDEN)?);
            put("attn_k", part(W_QKV, HIDDEN, kv)?);
            put("attn_v", part(W_QKV, HIDDEN + kv, kv)?);
            put("attn_output", part(W_OUT, 0, HIDDEN)?);
            put("ffn_norm", self.layer(layer, NORM_2).clone());
            put("ffn_gate", part(W_GATE_UP, 0, FFN)?);
            put("ffn_up", part(W_GATE_UP, FFN, FFN)?);
            put("ffn_down", part(W_DOWN, 0, HIDDEN)?);
        }
        named.push(("output_norm.weight".to_owned(), self.end(0).clone()));
        named.push(("output.weight".to_owned(), self.end(1).t()?.contiguous()?));
        Ok(named)
    }

    /// The number of weights.
    pub fn size(&self) -> usize {
        self.vars.iter().map(|var| var.elem_count()).sum()
    }
}
