//! The engine: one model in memory and what it takes to answer with it.
//!
//! Owns: loading, arithmetic, tokens, templates and batching. Must not: read a clock, know about shares, grants or the
//! agent, or be used outside a permit.

pub(crate) mod batch;
mod error;
mod kv;
pub(crate) mod load;
mod matrix;
pub(crate) mod model;
mod sampler;
mod source;
pub(crate) mod template;
pub(crate) mod tokenizer;

pub(crate) use error::EngineError;

use gogrid_gguf::Header;
use kv::KvCache;
use load::{Checked, Loader};
use model::Model;
use template::Template;
use tokenizer::{Tokenizer, TokenizerError};

#[cfg(test)]
mod tests;

/// A loaded model.
pub(crate) struct Engine {
    pub(crate) model: Model,
    pub(crate) cache: KvCache,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<Template>,
}

/// Text side of a model: everything but the weights.
pub(crate) struct Words {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<Template>,
}

impl Words {
    /// Builds tokenizer and template; the vocabulary must fit the embeddings.
    pub(crate) fn from_checked(checked: &Checked) -> Result<Self, EngineError> {
        let tokenizer = Tokenizer::from_header(&checked.header)?;
        if tokenizer.len() != crate::num::index(checked.facts.vocab) {
            let (rows, tokens) = (checked.facts.vocab, tokenizer.len());
            return Err(TokenizerError::Vocabulary { rows, tokens }.into());
        }
        let template = template(&checked.header, &tokenizer)?;
        Ok(Self { tokenizer, template })
    }
}

fn template(header: &Header, tokenizer: &Tokenizer) -> Result<Option<Template>, EngineError> {
    let Some(source) = header.str_opt("tokenizer.chat_template")? else {
        return Ok(None);
    };
    let text = |token: Option<u32>| token.map_or("", |token| tokenizer.text(token)).to_owned();
    let template = Template::new(source, text(tokenizer.bos), text(tokenizer.eos))
        .map_err(|error| EngineError::Template(error.to_string()))?;
    Ok(Some(template))
}

impl Engine {
    /// Puts a completely loaded model together.
    pub(crate) fn new(loader: Loader, words: Words) -> Result<Self, EngineError> {
        let (model, cache) = loader.finish()?;
        let Words { tokenizer, template } = words;
        Ok(Self {
            model,
            cache,
            tokenizer,
            template,
        })
    }

    /// Bytes of weights and caches.
    pub(crate) fn bytes(&self) -> u64 {
        self.model.bytes().saturating_add(self.cache.bytes())
    }

    /// Tokens of context of one sequence.
    pub(crate) fn context(&self) -> usize {
        self.cache.context()
    }
}
