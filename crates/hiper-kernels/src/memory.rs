//! What a step costs in memory.

/// What to save when time and memory cannot both be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Memory {
    /// Time: blocks keep what their backward pass needs.
    #[default]
    Fast,
    /// Memory: blocks keep their input, and on a CPU what their attentions gave, and compute the rest again.
    Lean,
}
