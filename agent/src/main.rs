//! The GoGrid node agent: lease, inventory, supervision of workers.
fn main() {}
