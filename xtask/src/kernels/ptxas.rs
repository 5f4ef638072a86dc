//! What `ptxas -v` says of kernels.

/// What a kernel takes on one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub kernel: String,
    /// `sm_90`.
    pub architecture: String,
    /// Of a thread.
    pub registers: u32,
    /// Static shared memory; what a launch asks for comes on top.
    pub shared_bytes: u32,
    /// Registers stored to memory and loaded again, its functions' too.
    pub spilled_bytes: u32,
}

/// Every kernel in `messages`, in their order.
pub fn usages(messages: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    for line in messages.lines() {
        if let Some((_, names)) = line.split_once("Compiling entry function ") {
            // 'kernel' for 'sm_90'
            let mut quoted = names.split('\'').skip(1).step_by(2).map(str::to_owned);
            let (kernel, architecture) = (quoted.next(), quoted.next());
            found.push(Usage {
                kernel: kernel.unwrap_or_default(),
                architecture: architecture.unwrap_or_default(),
                registers: 0,
                shared_bytes: 0,
                spilled_bytes: 0,
            });
        }
        // A function that was not inlined is described behind the kernel that calls it.
        let Some(last) = found.last_mut() else { continue };
        last.spilled_bytes +=
            number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        last.registers += number_before(line, " registers");
        last.shared_bytes += number_before(line, " bytes smem");
    }
    found
}

/// Lines that ptxas or nvcc calls warnings, as of bounds that it ignores, or a potential loss: of products of a warpgroup, each of
/// which waits for the one before it.
pub fn warnings(messages: &str) -> impl Iterator<Item = &str> {
    let is_one = |line: &&str| {
        let line = line.to_lowercase();
        ["warning", "potential performance loss"].iter().any(|words| line.contains(words))
    };
    messages.lines().filter(is_one)
}

/// The number in front of `words`; 0 where the line has none.
fn number_before(line: &str, words: &str) -> u32 {
    let before = line.split_once(words).map_or("", |(before, _)| before);
    before.rsplit([' ', ',']).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// nvcc 13.0 for two architectures, shortened; the second kernel has a function that was not inlined.
    const MESSAGES: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'softmax_f32' for 'sm_80'
ptxas info    : Function properties for softmax_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 372 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 7.871 ms
ptxas info    : 24 bytes gmem, 104 bytes cmem[3]
ptxas info    : Compiling entry function 'timestep_embedding_f16' for 'sm_90'
ptxas info    : Function properties for timestep_embedding_f16
    40 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 1024 bytes smem, 40 bytes cumulative stack size
ptxas info    : Compile time = 9.112 ms
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    40 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn usage_is_read() {
        let usage = |kernel: &str, architecture: &str, registers, shared_bytes, spilled_bytes| Usage {
            kernel: kernel.into(),
            architecture: architecture.into(),
            registers,
            shared_bytes,
            spilled_bytes,
        };
        let expected = [
            usage("softmax_f32", "sm_80", 20, 0, 0),
            usage("timestep_embedding_f16", "sm_90", 28, 1024, 12 + 16 + 4),
        ];
        assert_eq!(usages(MESSAGES), expected);
        assert_eq!(usages("nothing of interest"), []);
    }

    #[test]
    fn warnings_are_found() {
        assert_eq!(warnings(MESSAGES).count(), 0);
        let ignored = "ptxas warning : Value of threads per SM for entry k is out of range. .minnctapersm will be ignored";
        let serialized = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function 'k'";
        let both = format!("{MESSAGES}{ignored}\n{serialized}\n");
        assert_eq!(warnings(&both).collect::<Vec<_>>(), [ignored, serialized]);
    }
}
