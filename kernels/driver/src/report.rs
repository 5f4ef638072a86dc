//! What was asked of the card: launches by kernel, and how much memory was in use at once.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::memory::Memory;
use crate::work::Work;

#[derive(Default)]
pub struct Report {
    /// Bytes allocated and not freed, in the order of the stream.
    in_use: usize,
    /// Bytes that the pool keeps: the most that were in use since it gave some back.
    pool: usize,
    /// Bytes of the largest recording that was replayed: recordings take turns with their memory.
    recordings: usize,
    /// The most of both.
    most: usize,
    launches: BTreeMap<String, usize>,
    /// Of the last recording: those that may begin before the one before them has ended.
    early: usize,
    last_recording: String,
}

impl Report {
    /// Bytes that cannot be given to anything else.
    pub fn bytes(&self) -> usize {
        self.in_use + self.recordings
    }

    /// The same, and what the pool keeps of what was freed.
    pub fn kept(&self) -> usize {
        self.pool + self.recordings
    }

    pub fn allocated(&mut self, bytes: usize) {
        self.in_use += bytes;
        self.pool = self.pool.max(self.in_use);
        self.most = self.most.max(self.pool + self.recordings);
    }

    pub fn trimmed(&mut self) {
        self.pool = self.in_use;
    }

    /// A recording that needs so many bytes is replayed.
    pub fn recording_replayed(&mut self, works: &[Work], bytes: usize) {
        self.recordings = self.recordings.max(bytes);
        self.most = self.most.max(self.pool + self.recordings);
        works.iter().for_each(|work| self.launched(work));
    }

    pub fn noted(&mut self, work: &Work, memory: &Memory) {
        if let Work::Free(address) = work {
            self.in_use = self.in_use.saturating_sub(memory.bytes(*address));
        }
        self.launched(work);
    }

    fn launched(&mut self, work: &Work) {
        if let Work::Launch(launch) = work {
            *self.launches.entry(launch.function.name.clone()).or_default() += 1;
        }
    }

    /// The most bytes that a recording has in use, and those that it allocates and does not free.
    pub fn recorded(&mut self, works: &[Work], memory: &Memory) -> [usize; 2] {
        let (mut in_use, mut most) = (0, 0);
        self.last_recording.clear();
        self.early = 0;
        for work in works {
            match work {
                Work::Allocate(address) => {
                    in_use += memory.bytes(*address);
                    let _ = writeln!(self.last_recording, "(allocation)\t{}", memory.bytes(*address));
                }
                Work::Free(address) => in_use -= memory.bytes(*address),
                Work::Launch(launch) => {
                    self.early += usize::from(launch.early);
                    let [x, y, z] = launch.grid;
                    let numbers = launch.arguments.iter().zip(launch.function.signature.chars());
                    let numbers: Vec<String> =
                        numbers.filter(|(_, letter)| *letter != 'p').map(|(n, _)| n.to_string()).collect();
                    let _ = writeln!(
                        self.last_recording,
                        "{}\t{x} {y} {z}\t{}\t{}\t{}\t{}",
                        launch.function.name,
                        launch.block.iter().product::<u32>(),
                        launch.cluster,
                        launch.shared_bytes,
                        numbers.join(" ")
                    );
                }
                Work::Copy { bytes, .. } => {
                    let _ = writeln!(self.last_recording, "(copy)\t{bytes}");
                }
                Work::Fill { bytes, .. } => {
                    let _ = writeln!(self.last_recording, "(fill)\t{bytes}");
                }
                Work::Upload { .. } | Work::Read { .. } => {}
            }
            most = most.max(in_use);
        }
        [most, in_use]
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut text = format!("most bytes of the card at once\t{}\n", self.most);
        let _ = writeln!(text, "of which recordings have\t{}", self.recordings);
        for (name, count) in &self.launches {
            let _ = writeln!(text, "launches of {name}\t{count}");
        }
        let _ = writeln!(text, "of the last recording's kernels may begin early\t{}", self.early);
        let _ = writeln!(
            text,
            "\nthe last recording: kernel, grid, threads, blocks together, shared bytes, numbers"
        );
        text + &self.last_recording
    }
}
