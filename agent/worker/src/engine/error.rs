//! Why a model can't be loaded or a step can't be made. Owns the words that the agent sees.

use gogrid_gguf::{EstimateError, FactsError, FieldError, GgufError, UnsupportedModel};

/// Why the engine can't go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error(transparent)]
    Facts(#[from] FactsError),
    #[error(transparent)]
    Estimate(#[from] EstimateError),
    #[error(transparent)]
    Unsupported(#[from] UnsupportedModel),
    #[error("{0}")]
    UnsupportedFeature(String),
    #[error("tensor {tensor} is missing")]
    MissingTensor { tensor: String },
    #[error("tensor {tensor} has shape {found:?}, expected {expected:?}")]
    TensorShape {
        tensor: String,
        expected: Vec<u64>,
        found: Vec<u64>,
    },
    #[error("tensor {tensor} has type {kind}, which can't be used there")]
    TensorType { tensor: String, kind: &'static str },
    #[error("tensor {tensor} is no part of a {architecture} decoder")]
    UnknownTensor { tensor: String, architecture: String },
    #[error("{0}")]
    Tokenizer(#[from] super::tokenizer::TokenizerError),
    #[error("chat template: {0}")]
    Template(String),
    #[error("the model needs {needed} bytes and may take {limit}")]
    OutOfMemory { needed: u64, limit: u64 },
    #[error("{what}: no memory for {bytes} bytes")]
    Allocation { what: &'static str, bytes: u64 },
    #[error("reading the model: {0}")]
    Io(#[from] std::io::Error),
    #[error("compute kernel: {0}")]
    Kernel(#[from] candle_core::Error),
    #[error("internal: {0}")]
    Internal(&'static str),
}

impl EngineError {
    /// One word for the agent.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Gguf(GgufError::NotGguf { .. }) => "NotGguf",
            Self::Gguf(GgufError::Truncated { .. } | GgufError::OutsideFile { .. }) => "TruncatedModel",
            Self::Unsupported(UnsupportedModel::Architecture { .. }) => "UnsupportedArchitecture",
            Self::Unsupported(UnsupportedModel::TensorType { .. }) | Self::TensorType { .. } => {
                "UnsupportedTensorType"
            }
            Self::Unsupported(_) | Self::UnsupportedFeature(_) => "UnsupportedModel",
            Self::Tokenizer(error) => error.reason(),
            Self::OutOfMemory { .. } | Self::Allocation { .. } => "OutOfMemory",
            Self::Io(_) => "ModelUnreadable",
            Self::Kernel(_) | Self::Internal(_) => "EngineFailed",
            Self::Gguf(_)
            | Self::Field(_)
            | Self::Facts(_)
            | Self::Estimate(_)
            | Self::MissingTensor { .. }
            | Self::TensorShape { .. }
            | Self::UnknownTensor { .. }
            | Self::Template(_) => "InvalidModel",
        }
    }
}
