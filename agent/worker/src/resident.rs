//! What is behind the permit: a model on its way into memory, then the engine.
//!
//! Owns: the steps of loading, prompts, and cutting a step of the batch where its time is up. Must not wait.

use crate::clock;
use crate::engine::batch::{Batch, Event};
use crate::engine::load::{Loader, Size, check};
use crate::engine::template::Message;
use crate::engine::{Engine, EngineError, Words};
use candle_core::Device;
use std::fs::File;

/// The user of the device.
pub(crate) enum Resident {
    Empty,
    Opened(File, Size),
    Loading(Box<(Loader, Words)>),
    Ready(Box<Engine>),
}

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromptError {
    #[error("the model has no chat template; use /v1/completions")]
    NoTemplate,
    #[error("chat template: {0}")]
    Template(#[from] minijinja::Error),
    #[error("{0}")]
    Tokenizer(#[from] crate::engine::tokenizer::TokenizerError),
    #[error("the prompt is empty")]
    Empty,
    #[error("the prompt has {tokens} tokens, the context holds {context}")]
    TooLong { tokens: usize, context: usize },
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl PromptError {
    /// One word for the result.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NoTemplate => "NoChatTemplate",
            Self::Template(_) => "TemplateFailed",
            Self::Tokenizer(_) => "NotTokenizable",
            Self::Empty => "InvalidRecord",
            Self::TooLong { .. } => "PromptTooLong",
            Self::Engine(_) => "EngineFailed",
        }
    }
}

/// What a prompt is made from.
pub(crate) enum Source<'a> {
    Text(&'a str),
    Messages(&'a [Message]),
}

/// Most device time between two looks at the grant, in nanoseconds.
const SLICE: u64 = 8_000_000;
/// Rows of a prompt chunk: the fewest that still use the weights well, and the most that memory was set aside for.
const ROWS: std::ops::RangeInclusive<u64> = 4..=64;

/// How long a row takes in one layer, so that a chunk fits a slice.
#[derive(Default)]
pub(crate) struct Pace {
    nanos_per_row: u64,
}

impl Pace {
    /// Rows of the next step.
    fn rows(&self) -> usize {
        let rows = SLICE.checked_div(self.nanos_per_row).unwrap_or(16);
        usize::try_from(rows.clamp(*ROWS.start(), *ROWS.end())).unwrap_or(16)
    }

    fn learn(&mut self, nanoseconds: u64, rows: u64) {
        let fresh = nanoseconds / rows.max(1);
        self.nanos_per_row = if self.nanos_per_row == 0 {
            fresh
        } else {
            (self.nanos_per_row.saturating_mul(3).saturating_add(fresh)) / 4
        };
    }
}

impl Resident {
    /// One step of loading; true when the engine is ready.
    pub(crate) fn load(&mut self, device: &Device) -> Result<bool, EngineError> {
        match std::mem::replace(self, Self::Empty) {
            Self::Opened(file, size) => {
                let checked = check(&file)?;
                gogrid_gguf::supported(&checked.facts)?;
                let words = Words::from_checked(&checked)?;
                let loader = Loader::begin(file, &checked, size)?;
                *self = Self::Loading(Box::new((loader, words)));
                Ok(false)
            }
            Self::Loading(mut both) => {
                if both.0.step(device)? {
                    *self = Self::Loading(both);
                    return Ok(false);
                }
                let (loader, words) = *both;
                *self = Self::Ready(Box::new(Engine::new(loader, words)?));
                Ok(true)
            }
            other => {
                *self = other;
                Ok(true)
            }
        }
    }

    fn engine(&mut self) -> Result<&mut Engine, EngineError> {
        match self {
            Self::Ready(engine) => Ok(engine),
            _ => Err(EngineError::Internal("the model is not loaded")),
        }
    }

    /// Whether a model is on its way.
    pub(crate) fn is_loading(&self) -> bool {
        matches!(self, Self::Opened(..) | Self::Loading(_))
    }

    /// Bytes of weights and caches; 0 before they are there.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Ready(engine) => engine.bytes(),
            _ => 0,
        }
    }

    /// Tokens of a prompt that fits the context.
    pub(crate) fn prompt(&mut self, source: &Source<'_>) -> Result<Vec<u32>, PromptError> {
        let engine = self.engine()?;
        let tokens = match source {
            Source::Text(text) => engine.tokenizer.prompt(text)?,
            Source::Messages(messages) => {
                let template = engine.template.as_ref().ok_or(PromptError::NoTemplate)?;
                engine.tokenizer.prompt(&template.render(messages)?)?
            }
        };
        match tokens.len() {
            0 => Err(PromptError::Empty),
            many if many > engine.context() => Err(PromptError::TooLong {
                tokens: many,
                context: engine.context(),
            }),
            _ => Ok(tokens),
        }
    }

    /// Goes on with the batch until a step is complete or its slice of time is used.
    pub(crate) fn advance(
        &mut self,
        batch: &mut Batch,
        pace: &mut Pace,
    ) -> Result<Option<Vec<Event>>, EngineError> {
        #[cfg(feature = "faults")]
        crate::faults::strike();
        let engine = self.engine()?;
        let begun = clock::process_cpu();
        let mut last = begun;
        loop {
            let events = batch.advance(engine, pace.rows())?;
            let now = clock::process_cpu();
            pace.learn(now.saturating_sub(last), batch.rows_in_step());
            last = now;
            if events.is_some() || now.saturating_sub(begun) >= SLICE {
                return Ok(events);
            }
        }
    }
}
