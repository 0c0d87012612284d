//! From a GGUF file to a model in memory.
//!
//! Owns: the check of every tensor against the metadata, and loading in pieces so that loading can be billed.
//! The header is validated before any other byte is touched. Must not compute.

use super::EngineError;
use super::kv::KvCache;
use super::matrix::{Matrix, floats};
use super::model::{Layer, Model, Shape};
use super::source::Source;
use crate::num::{float, index, wide};
use candle_core::Device;
use gogrid_gguf::{
    Backend, Demand, Estimate, Facts, Header, KvType, Limits, TensorInfo, parse_from, supported,
};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Seek, SeekFrom};

/// How much the engine is to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) context_tokens: u32,
    pub(crate) parallel_sequences: u16,
    /// Most bytes; 0 = no limit.
    pub(crate) memory: u64,
}

/// A checked header with its facts.
pub(crate) struct Checked {
    pub(crate) header: Header,
    pub(crate) facts: Facts,
}

/// Reads and checks the header; nothing else of the file is touched.
pub(crate) fn check(file: &File) -> Result<Checked, EngineError> {
    let header = header(file)?;
    let facts = Facts::from_header(&header)?;
    Ok(Checked { header, facts })
}

/// Reads the header alone; the file may hold a vocabulary and no model.
pub(crate) fn header(mut file: &File) -> Result<Header, EngineError> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(0))?;
    Ok(parse_from(&mut file, length, &Limits::default())?)
}

/// What the model takes in this engine.
pub(crate) fn estimate(facts: &Facts, size: &Size) -> Result<Estimate, EngineError> {
    let demand = Demand {
        context_tokens: size.context_tokens,
        parallel_sequences: u32::from(size.parallel_sequences),
        kv_type: KvType::F32,
        backend: Backend::CPU,
    };
    Ok(Estimate::new(facts, &demand)?)
}

/// A model being loaded, a piece of a tensor a step.
pub(crate) struct Loader {
    source: Source,
    /// The matrix under way and where its next byte lies.
    begun: Option<(TensorInfo, Matrix, u64)>,
    /// Where pieces of the file are read to; of this type for its alignment.
    buffer: Vec<u64>,
    facts: Facts,
    shape: Shape,
    size: Size,
    todo: VecDeque<TensorInfo>,
    matrices: BTreeMap<String, Matrix>,
    vectors: BTreeMap<String, Vec<f32>>,
}

impl Loader {
    /// Checks everything that can be checked without reading tensors.
    pub(crate) fn begin(file: File, checked: &Checked, size: Size) -> Result<Self, EngineError> {
        let Checked { header, facts } = checked;
        supported(facts)?;
        let estimate = estimate(facts, &size)?;
        if size.memory > 0 && estimate.total > size.memory {
            return Err(EngineError::OutOfMemory {
                needed: estimate.total,
                limit: size.memory,
            });
        }
        let wanted = wanted(header, facts)?;
        let mut todo = VecDeque::with_capacity(header.tensors.len());
        for tensor in &header.tensors {
            let Some(expected) = wanted.get(&tensor.name) else {
                if ignored(&tensor.name) {
                    continue;
                }
                let architecture = facts.architecture.clone();
                return Err(EngineError::UnknownTensor {
                    tensor: tensor.name.clone(),
                    architecture,
                });
            };
            if tensor.shape != *expected {
                return Err(EngineError::TensorShape {
                    tensor: tensor.name.clone(),
                    expected: expected.clone(),
                    found: tensor.shape.clone(),
                });
            }
            todo.push_back(tensor.clone());
        }
        for name in wanted.keys() {
            let optional = name == "output.weight" || name == "rope_freqs.weight";
            if !optional && header.tensor(name).is_none() {
                return Err(EngineError::MissingTensor { tensor: name.clone() });
            }
        }
        let shape = Shape {
            embedding: index(facts.embedding),
            heads: index(facts.heads),
            kv_heads: facts.kv_heads.first().map_or(0, |heads| index(*heads)),
            head_width: index(facts.key_length),
            feed_forward: index(facts.feed_forward),
            norm_epsilon: header.f32("llama.attention.layer_norm_rms_epsilon")?,
            rope: Vec::new(),
        };
        let facts = facts.clone();
        let mut loader = Self {
            source: Source::new(file),
            begun: None,
            buffer: Vec::new(),
            facts,
            shape,
            size,
            todo,
            matrices: BTreeMap::new(),
            vectors: BTreeMap::new(),
        };
        loader.shape.rope = rope(header, &loader.facts)?;
        Ok(loader)
    }

    /// Loads the next piece; false when none is left.
    pub(crate) fn step(&mut self, device: &Device) -> Result<bool, EngineError> {
        if let Some((tensor, matrix, offset)) = self.begun.take() {
            self.shard(device, tensor, matrix, offset)?;
        } else if let Some(tensor) = self.todo.pop_front() {
            match *tensor.shape.as_slice() {
                [_] => {
                    let length = usize::try_from(tensor.bytes)
                        .map_err(|_| EngineError::Internal("length of a tensor"))?;
                    let bytes = read(&mut self.source, &mut self.buffer, tensor.offset, length)?;
                    let values = floats(tensor.kind, bytes).map_err(|error| named(error, &tensor))?;
                    self.vectors.insert(tensor.name, values);
                }
                [inputs, outputs] => {
                    let matrix = Matrix::begin(tensor.kind, outputs, inputs, tensor.bytes)?;
                    let offset = tensor.offset;
                    self.shard(device, tensor, matrix, offset)?;
                }
                _ => return Err(EngineError::Internal("rank of a wanted tensor")),
            }
        }
        Ok(self.begun.is_some() || !self.todo.is_empty())
    }

    fn shard(
        &mut self,
        device: &Device,
        tensor: TensorInfo,
        mut matrix: Matrix,
        offset: u64,
    ) -> Result<(), EngineError> {
        let length = matrix.missing();
        let bytes = read(&mut self.source, &mut self.buffer, offset, length)?;
        matrix
            .push(device, bytes)
            .map_err(|error| named(error, &tensor))?;
        if matrix.missing() == 0 {
            self.matrices.insert(tensor.name, matrix);
        } else {
            self.begun = Some((tensor, matrix, offset.saturating_add(wide(length))));
        }
        Ok(())
    }

    /// The model with its caches, when every tensor is there.
    pub(crate) fn finish(mut self) -> Result<(Model, KvCache), EngineError> {
        if let Some(factors) = self.vectors.remove("rope_freqs.weight") {
            for (rate, factor) in self.shape.rope.iter_mut().zip(factors) {
                if factor.is_nan() || factor <= 0.0 {
                    return Err(EngineError::UnsupportedFeature(format!(
                        "rope_freqs.weight holds {factor}; factors are above 0"
                    )));
                }
                *rate /= factor;
            }
        }
        let mut layers = Vec::with_capacity(index(self.facts.layers));
        for layer in 0..self.facts.layers {
            layers.push(Layer {
                attention_norm: self.vector(&format!("blk.{layer}.attn_norm.weight"))?,
                query: self.matrix(&format!("blk.{layer}.attn_q.weight"))?,
                key: self.matrix(&format!("blk.{layer}.attn_k.weight"))?,
                value: self.matrix(&format!("blk.{layer}.attn_v.weight"))?,
                attention_output: self.matrix(&format!("blk.{layer}.attn_output.weight"))?,
                feed_forward_norm: self.vector(&format!("blk.{layer}.ffn_norm.weight"))?,
                gate: self.matrix(&format!("blk.{layer}.ffn_gate.weight"))?,
                up: self.matrix(&format!("blk.{layer}.ffn_up.weight"))?,
                down: self.matrix(&format!("blk.{layer}.ffn_down.weight"))?,
            });
        }
        let model = Model {
            embeddings: self.matrix("token_embd.weight")?,
            output_norm: self.vector("output_norm.weight")?,
            output: self.matrices.remove("output.weight"),
            layers,
            shape: self.shape.clone(),
        };
        let cache = KvCache::new(
            model.layers.len(),
            usize::from(self.size.parallel_sequences),
            model.shape.kv_heads,
            index(self.size.context_tokens),
            model.shape.head_width,
        )?;
        let taken = model.bytes().saturating_add(cache.bytes());
        if self.size.memory > 0 && taken > self.size.memory {
            return Err(EngineError::OutOfMemory {
                needed: taken,
                limit: self.size.memory,
            });
        }
        Ok((model, cache))
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix, EngineError> {
        self.matrices
            .remove(name)
            .ok_or_else(|| EngineError::MissingTensor { tensor: name.into() })
    }

    fn vector(&mut self, name: &str) -> Result<Vec<f32>, EngineError> {
        self.vectors
            .remove(name)
            .ok_or_else(|| EngineError::MissingTensor { tensor: name.into() })
    }
}

/// That part of the file, aligned for every block type.
fn read<'b>(
    source: &mut Source,
    buffer: &'b mut Vec<u64>,
    offset: u64,
    length: usize,
) -> Result<&'b [u8], EngineError> {
    let words = length.div_ceil(8);
    let more = words.saturating_sub(buffer.len());
    buffer
        .try_reserve_exact(more)
        .map_err(|_| EngineError::Allocation {
            what: "a piece of the file",
            bytes: wide(length),
        })?;
    buffer.resize(words.max(buffer.len()), 0);
    let bytes = bytemuck::cast_slice_mut::<u64, u8>(buffer)
        .get_mut(..length)
        .ok_or(EngineError::Internal("buffer of a piece"))?;
    source.read_exact(bytes, offset)?;
    Ok(bytes)
}

/// The error with the tensor's name, where the kernel's type did not know it.
fn named(error: EngineError, tensor: &TensorInfo) -> EngineError {
    match error {
        EngineError::TensorType { kind, .. } => EngineError::TensorType {
            tensor: tensor.name.clone(),
            kind,
        },
        other => other,
    }
}

/// Tensors that older converters wrote and that follow from the metadata.
fn ignored(name: &str) -> bool {
    name.ends_with(".attn_rot_embd.weight") || name.ends_with(".attn.rot_embd")
}

/// Every tensor of a llama decoder with the shape that the metadata ask for.
fn wanted(header: &Header, facts: &Facts) -> Result<BTreeMap<String, Vec<u64>>, EngineError> {
    let unsupported = |text: String| Err(EngineError::UnsupportedFeature(text));
    let kv_heads = facts.kv_heads.first().copied().unwrap_or(0);
    if facts.kv_heads.iter().any(|heads| *heads != kv_heads) {
        return unsupported(
            "llama.attention.head_count_kv differs between layers; this engine wants one number".into(),
        );
    }
    if kv_heads == 0 || !facts.heads.is_multiple_of(kv_heads) {
        return unsupported(format!(
            "{} heads can't share {kv_heads} key/value heads evenly",
            facts.heads
        ));
    }
    if facts.key_length != facts.value_length {
        return unsupported(format!(
            "keys of {} and values of {} elements; this engine wants equal lengths",
            facts.key_length, facts.value_length
        ));
    }
    for key in ["llama.attention.head_count", "llama.feed_forward_length"] {
        if let Ok([first, rest @ ..]) = header.u32s(key).as_deref()
            && rest.iter().any(|value| value != first)
        {
            return unsupported(format!(
                "{key} differs between layers; this engine wants one number"
            ));
        }
    }
    let [embedding, forward, vocabulary] = [facts.embedding, facts.feed_forward, facts.vocab].map(u64::from);
    let width = u64::from(facts.key_length);
    let (query, key) = (u64::from(facts.heads) * width, u64::from(kv_heads) * width);
    let mut wanted = BTreeMap::from([
        ("token_embd.weight".to_owned(), vec![embedding, vocabulary]),
        ("output_norm.weight".to_owned(), vec![embedding]),
        ("output.weight".to_owned(), vec![embedding, vocabulary]),
    ]);
    if header.tensor("rope_freqs.weight").is_some() {
        let turned = u64::from(rope_width(header, facts)?) / 2;
        wanted.insert("rope_freqs.weight".to_owned(), vec![turned]);
    }
    for layer in 0..facts.layers {
        for (name, shape) in [
            ("attn_norm", vec![embedding]),
            ("attn_q", vec![embedding, query]),
            ("attn_k", vec![embedding, key]),
            ("attn_v", vec![embedding, key]),
            ("attn_output", vec![query, embedding]),
            ("ffn_norm", vec![embedding]),
            ("ffn_gate", vec![embedding, forward]),
            ("ffn_up", vec![embedding, forward]),
            ("ffn_down", vec![forward, embedding]),
        ] {
            wanted.insert(format!("blk.{layer}.{name}.weight"), shape);
        }
    }
    Ok(wanted)
}

fn rope_width(header: &Header, facts: &Facts) -> Result<u32, EngineError> {
    let width = header.u32_or("llama.rope.dimension_count", facts.key_length)?;
    if width == 0 || width > facts.key_length || !width.is_multiple_of(2) {
        return Err(EngineError::UnsupportedFeature(format!(
            "llama.rope.dimension_count is {width}; it must be even and 2 to {}",
            facts.key_length
        )));
    }
    Ok(width)
}

/// Turns per position of each pair: base^(−2i/width), divided by a linear scaling factor if there is one.
fn rope(header: &Header, facts: &Facts) -> Result<Vec<f32>, EngineError> {
    let width = rope_width(header, facts)?;
    let base = header.f32_or("llama.rope.freq_base", 10_000.0)?;
    if !base.is_finite() || base <= 0.0 {
        return Err(EngineError::UnsupportedFeature(format!(
            "llama.rope.freq_base is {base}; it must be above 0"
        )));
    }
    let kind = header.str_opt("llama.rope.scaling.type")?.unwrap_or("none");
    let factor = match kind {
        "none" => header.f32_or("llama.rope.scale_linear", 1.0)?,
        "linear" => header.f32("llama.rope.scaling.factor")?,
        other => {
            return Err(EngineError::UnsupportedFeature(format!(
                "llama.rope.scaling.type is {other:?}; none and linear are supported"
            )));
        }
    };
    if !factor.is_finite() || factor <= 0.0 {
        return Err(EngineError::UnsupportedFeature(format!(
            "RoPE scaling factor {factor}; it must be above 0"
        )));
    }
    let turns = (0..width / 2).map(|pair| base.powf(-2.0 * float(pair) / float(width)) / factor);
    Ok(turns.collect())
}
