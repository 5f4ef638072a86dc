//! A kernel's launch bounds, as PTX has them.

/// The registers of a multiprocessor, of compute capability 8.0 and 9.0.
const REGISTERS: u32 = 65_536;
/// Registers come to a warp in portions: eight a thread.
const PORTION: u32 = 8;
/// What a thread can have.
const MOST: u32 = 255;
/// What a block can have.
const THREADS: u32 = 1024;

/// What a kernel was promised, `__launch_bounds__(threads, blocks)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Its name.
    pub kernel: String,
    /// Of a block, at most.
    pub threads: u32,
    /// On a multiprocessor at a time, at least.
    pub blocks: u32,
}

impl Bounds {
    /// What a thread may take of them; none where no block can run.
    pub fn registers(&self) -> Option<u32> {
        let fits = (1..=THREADS).contains(&self.threads);
        let share =
            REGISTERS.checked_div(self.threads.next_multiple_of(32) * self.blocks).filter(|_| fits)?;
        Some((share / PORTION * PORTION).min(MOST))
    }
}

/// Those of every kernel in `ptx` that has them, in order.
pub fn bounds(ptx: &str) -> Vec<Bounds> {
    let mut found = Vec::new();
    for entry in ptx.split(".entry ").skip(1) {
        // name(parameters) directives { body }
        let (head, _) = entry.split_once('{').unwrap_or((entry, ""));
        let kernel = head.split(|c: char| c == '(' || c.is_whitespace()).next().unwrap_or_default();
        let sizes = |directive: &str| -> Option<u32> {
            let (_, sizes) = head.lines().find_map(|line| line.trim().split_once(directive))?;
            sizes.split(',').map(|size| size.trim().parse::<u32>().ok()).product()
        };
        if let Some(threads) = sizes(".maxntid ") {
            found.push(Bounds {
                kernel: kernel.into(),
                threads,
                blocks: sizes(".minnctapersm ").unwrap_or(1),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "\
.version 9.0
.target sm_90
	// .globl	add_f32
.visible .entry add_f32(
	.param .u64 .ptr .align 1 add_f32_param_0,
	.param .u64 add_f32_param_1
)
.maxntid 256
{
	.reg .pred 	%p<5>;
	ret;
}
.visible .entry attention(
	.param .u32 attention_param_0
)
.maxntid 32, 4, 1
.minnctapersm 2
{
	ret;
}
.visible .entry unbound()
{
	ret;
}
";

    fn of(threads: u32, blocks: u32) -> Bounds {
        Bounds { kernel: "k".into(), threads, blocks }
    }

    #[test]
    fn bounds_are_read() {
        let expected = [
            Bounds { kernel: "add_f32".into(), ..of(256, 1) },
            Bounds { kernel: "attention".into(), ..of(128, 2) },
        ];
        assert_eq!(bounds(PTX), expected);
    }

    #[test]
    fn registers_are_shared_out() {
        assert_eq!(of(256, 4).registers(), Some(64));
        assert_eq!(of(256, 3).registers(), Some(80));
        assert_eq!(of(1024, 1).registers(), Some(64));
        assert_eq!(of(1, 1).registers(), Some(255));
        assert_eq!((of(0, 1).registers(), of(1025, 1).registers()), (None, None));
    }
}
