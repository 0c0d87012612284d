//! Model sources and the content-addressed model store.
//!
//! This crate owns the way from a model's address to a read-only file whose SHA-256 is the one that was asked for:
//! [`ModelUri`] (syntax), [`Roots`] (what may be opened), [`AddressPolicy`] (what may be contacted), [`Store`] (what is
//! kept). It must not look into a model, decide which model a node needs, or keep credentials.

mod address;
mod digest;
mod error;
mod hash;
mod http;
mod partial;
mod roots;
mod store;
mod uri;

pub use address::{AddressClass, AddressPolicy, classify};
pub use digest::Sha256;
pub use error::StoreError;
pub use http::HttpLimits;
pub use roots::{ListedModel, Listing, Roots};
pub use store::{Store, StoreConfig, StoredObject, VerifiedModel};
pub use uri::ModelUri;
