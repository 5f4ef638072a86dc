//! hiper
fn main() {}
