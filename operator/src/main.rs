//! The GoGrid operator: observe, validate, plan, apply, status.
fn main() {}
