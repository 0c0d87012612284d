//! Model sources and the content-addressed model store.
