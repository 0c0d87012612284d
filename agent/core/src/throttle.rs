//! When a request may start and when a device may be used.
