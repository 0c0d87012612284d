//! Why a worker ends. Owns the words that the agent is told.

use crate::engine::EngineError;
use crate::wire::WireError;

/// Why a worker ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("limits: {0}")]
    Limits(std::io::Error),
    #[error("starting threads: {0}")]
    Threads(String),
    #[error("{0}")]
    Protocol(String),
}

impl SessionError {
    /// One word for the agent.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Engine(error) => error.reason(),
            Self::Limits(_) => "LimitsFailed",
            Self::Threads(_) => "NoThreads",
            Self::Protocol(_) | Self::Wire(_) => "ProtocolError",
        }
    }
}
