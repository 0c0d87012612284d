//! The llama decoder: what the tensors are, and one pass of a batch of tokens through them.
//!
//! Owns the arithmetic. A pass is advanced layer by layer, so a step can be cut where a share of the device ends. A
//! row's numbers depend only on its own sequence. Must not know about text, sampling or requests.

use super::EngineError;
use super::kv::KvCache;
use super::matrix::{Matrix, dot, for_each};
use crate::num::{float, index};

/// Sizes of a decoder.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) embedding: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_width: usize,
    pub(crate) feed_forward: usize,
    pub(crate) norm_epsilon: f32,
    /// Turns per position of each rotated pair, in radians.
    pub(crate) rope: Vec<f32>,
}

pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) query: Matrix,
    pub(crate) key: Matrix,
    pub(crate) value: Matrix,
    pub(crate) attention_output: Matrix,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

/// A loaded decoder.
pub(crate) struct Model {
    pub(crate) shape: Shape,
    pub(crate) embeddings: Matrix,
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Vec<f32>,
    /// Absent: tied to the embeddings.
    pub(crate) output: Option<Matrix>,
}

/// One token of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) slot: usize,
    pub(crate) position: u32,
    pub(crate) token: u32,
    /// Whether the scores of the next token are wanted.
    pub(crate) scored: bool,
}

/// A step under way.
pub(crate) struct Pass {
    rows: Vec<Row>,
    /// Cosine and sine of every rotated pair of every row.
    turns: Vec<(f32, f32)>,
    hidden: Vec<f32>,
    next_layer: usize,
    /// Scores of the rows that want them, in order; filled by the last advance.
    scores: Vec<f32>,
    scratch: Scratch,
    done: bool,
}

#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    attended: Vec<f32>,
    projected: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Pass {
    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Scores of each row that wanted them, `vocabulary` numbers each.
    pub(crate) fn scores(&self) -> &[f32] {
        &self.scores
    }
}

impl Model {
    /// Tokens the model knows.
    pub(crate) fn vocabulary(&self) -> usize {
        self.embeddings.outputs()
    }

    /// Bytes of all weights.
    pub(crate) fn bytes(&self) -> u64 {
        let layers: u64 = self
            .layers
            .iter()
            .flat_map(|l| {
                [
                    &l.query,
                    &l.key,
                    &l.value,
                    &l.attention_output,
                    &l.gate,
                    &l.up,
                    &l.down,
                ]
            })
            .map(Matrix::bytes)
            .sum();
        layers + self.embeddings.bytes() + self.output.as_ref().map_or(0, Matrix::bytes)
    }

    /// Starts a step: looks up the embeddings.
    pub(crate) fn begin(&self, rows: Vec<Row>) -> Result<Pass, EngineError> {
        let width = self.shape.embedding;
        let mut hidden = vec![0.0; rows.len() * width];
        let mut turns = Vec::with_capacity(rows.len() * self.shape.rope.len());
        for (row, into) in rows.iter().zip(hidden.chunks_mut(width)) {
            self.embeddings.row(row.token, into)?;
            let position = float(row.position);
            turns.extend(self.shape.rope.iter().map(|rate| {
                let (sin, cos) = (position * rate).sin_cos();
                (cos, sin)
            }));
        }
        Ok(Pass {
            rows,
            turns,
            hidden,
            next_layer: 0,
            scores: Vec::new(),
            scratch: Scratch::default(),
            done: false,
        })
    }

    /// Computes one more layer, or the scores after the last; true when the step is complete.
    pub(crate) fn advance(&self, pass: &mut Pass, cache: &mut KvCache) -> Result<bool, EngineError> {
        match self.layers.get(pass.next_layer) {
            Some(layer) => {
                self.attention(layer, pass, cache)?;
                self.feed_forward(layer, pass)?;
                pass.next_layer += 1;
                // Nobody wants scores: the step is over with the last layer.
                pass.done = pass.next_layer == self.layers.len() && !pass.rows.iter().any(|row| row.scored);
            }
            None if !pass.done => {
                self.score(pass)?;
                pass.done = true;
            }
            None => {}
        }
        Ok(pass.done)
    }

    fn attention(&self, layer: &Layer, pass: &mut Pass, cache: &mut KvCache) -> Result<(), EngineError> {
        let shape = &self.shape;
        let Pass {
            rows,
            turns,
            hidden,
            scratch,
            next_layer,
            ..
        } = pass;
        let count = rows.len();
        self.normalise(hidden, &layer.attention_norm, &mut scratch.normed);
        let kv_width = shape.kv_heads * shape.head_width;
        let query_width = shape.heads * shape.head_width;
        layer
            .query
            .multiply(&scratch.normed, sized(&mut scratch.query, count * query_width))?;
        layer
            .key
            .multiply(&scratch.normed, sized(&mut scratch.key, count * kv_width))?;
        layer
            .value
            .multiply(&scratch.normed, sized(&mut scratch.value, count * kv_width))?;
        for (row, turns) in turns.chunks(shape.rope.len().max(1)).enumerate().take(count) {
            for (values, width) in [(&mut scratch.query, query_width), (&mut scratch.key, kv_width)] {
                if let Some(heads) = values.get_mut(row * width..(row + 1) * width) {
                    heads
                        .chunks_mut(shape.head_width)
                        .for_each(|head| rotate(head, turns));
                }
            }
        }
        for ((row, key), value) in rows
            .iter()
            .zip(scratch.key.chunks(kv_width))
            .zip(scratch.value.chunks(kv_width))
        {
            cache.store(*next_layer, row.slot, index(row.position), key, value)?;
        }
        sized(&mut scratch.attended, count * query_width);
        self.attend(*next_layer, rows, &scratch.query, &mut scratch.attended, cache);
        let projected = sized(&mut scratch.projected, count * shape.embedding);
        layer.attention_output.multiply(&scratch.attended, projected)?;
        add(hidden, projected);
        Ok(())
    }

    /// Every (row, head) is one task: softmax(q·K / √width) · V over that sequence's positions.
    fn attend(&self, layer: usize, rows: &[Row], query: &[f32], attended: &mut [f32], cache: &KvCache) {
        let shape = &self.shape;
        let width = shape.head_width;
        let group = shape.heads / shape.kv_heads.max(1);
        let scale = 1.0 / float(u32::try_from(width).unwrap_or(1)).sqrt();
        let heads = rows
            .iter()
            .flat_map(|row| (0..shape.heads).map(move |head| (row, head)));
        let mut tasks: Vec<_> = attended
            .chunks_mut(width)
            .zip(query.chunks(width))
            .zip(heads)
            .collect();
        let work: usize = rows
            .iter()
            .map(|row| (index(row.position) + 1) * shape.heads * width * 2)
            .sum();
        for_each(&mut tasks, work, |((out, query), (row, head))| {
            let count = index(row.position) + 1;
            let (keys, values) = cache.head(layer, row.slot, *head / group.max(1), count);
            let mut weights: Vec<f32> = keys.chunks(width).map(|key| dot(query, key) * scale).collect();
            softmax(&mut weights);
            out.fill(0.0);
            for (weight, value) in weights.iter().zip(values.chunks(width)) {
                for (out, value) in out.iter_mut().zip(value) {
                    *out += weight * value;
                }
            }
        });
    }

    fn feed_forward(&self, layer: &Layer, pass: &mut Pass) -> Result<(), EngineError> {
        let Pass {
            rows,
            hidden,
            scratch,
            ..
        } = pass;
        let (count, width) = (rows.len(), self.shape.feed_forward);
        self.normalise(hidden, &layer.feed_forward_norm, &mut scratch.normed);
        layer
            .gate
            .multiply(&scratch.normed, sized(&mut scratch.gate, count * width))?;
        layer
            .up
            .multiply(&scratch.normed, sized(&mut scratch.up, count * width))?;
        for (gate, up) in scratch.gate.iter_mut().zip(&scratch.up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        let projected = sized(&mut scratch.projected, count * self.shape.embedding);
        layer.down.multiply(&scratch.gate, projected)?;
        add(hidden, projected);
        Ok(())
    }

    fn score(&self, pass: &mut Pass) -> Result<(), EngineError> {
        let width = self.shape.embedding;
        let scored: Vec<f32> = pass
            .rows
            .iter()
            .zip(pass.hidden.chunks(width))
            .filter(|(row, _)| row.scored)
            .flat_map(|(_, hidden)| hidden.iter().copied())
            .collect();
        let mut normed = Vec::new();
        self.normalise(&scored, &self.output_norm, &mut normed);
        let output = self.output.as_ref().unwrap_or(&self.embeddings);
        let rows = scored.len() / width.max(1);
        output.multiply(&normed, sized(&mut pass.scores, rows * output.outputs()))
    }

    fn normalise(&self, rows: &[f32], weights: &[f32], into: &mut Vec<f32>) {
        let width = self.shape.embedding;
        let into = sized(into, rows.len());
        let elements = float(u32::try_from(width).unwrap_or(1));
        for (row, out) in rows.chunks(width).zip(into.chunks_mut(width)) {
            let scale = 1.0 / (dot(row, row) / elements + self.shape.norm_epsilon).sqrt();
            for ((out, value), weight) in out.iter_mut().zip(row).zip(weights) {
                *out = value * scale * weight;
            }
        }
    }
}

fn sized(buffer: &mut Vec<f32>, size: usize) -> &mut [f32] {
    buffer.resize(size, 0.0);
    buffer
}

fn add(into: &mut [f32], values: &[f32]) {
    for (into, value) in into.iter_mut().zip(values) {
        *into += value;
    }
}

/// Turns neighbouring pairs (llama.cpp's "norm" RoPE); elements beyond the turned ones stay.
fn rotate(head: &mut [f32], turns: &[(f32, f32)]) {
    for ([a, b], (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

/// In place; the largest score is taken off first, so nothing overflows.
pub(crate) fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    for score in scores.iter_mut() {
        *score /= sum;
    }
}
