//! What a driver remembers: a queue of work that waits to be done, recordings, and what went wrong.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use crate::card::Card;
use crate::memory::{Memory, Owner};
use crate::report::Report;
use crate::work::{Function, Work};

/// What a function of the driver returns when it did not do what it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u32);

impl Status {
    pub const INVALID_VALUE: Self = Self(1);
    pub const OUT_OF_MEMORY: Self = Self(2);
    pub const NOT_INITIALIZED: Self = Self(3);
    pub const INVALID_DEVICE: Self = Self(101);
    pub const INVALID_CONTEXT: Self = Self(201);
    pub const INVALID_HANDLE: Self = Self(400);
    pub const NOT_FOUND: Self = Self(500);
    pub const LAUNCH_FAILED: Self = Self(719);
    pub const CAPTURE_UNSUPPORTED: Self = Self(900);
    pub const CAPTURE_INVALIDATED: Self = Self(901);
    pub const CAPTURE_UNMATCHED: Self = Self(903);
    pub const CAPTURE_ISOLATION: Self = Self(905);
    pub const CAPTURE_IMPLICIT: Self = Self(906);
    pub const CAPTURE_WRONG_THREAD: Self = Self(908);
}

pub type Result<T = ()> = std::result::Result<T, Status>;

/// A stream's launches, noted instead of done.
struct Capture {
    stream: u64,
    number: u64,
    thread: std::thread::ThreadId,
    works: Vec<Work>,
    invalid: bool,
}

/// How many things may wait to be done, so that freed memory does not wait for long.
const MOST_WAITING: usize = 256;

pub struct State {
    pub card: Card,
    pub memory: Memory,
    pub report: Report,
    /// Streams are in the order in which they were given work, which is one of those that a card may choose.
    waiting: VecDeque<Rc<[Work]>>,
    capture: Option<Capture>,
    /// Each one's works, and the most bytes that they have in use.
    recordings: HashMap<u64, (Rc<[Work]>, usize)>,
    /// A recording's number by an event's.
    events: HashMap<u64, Option<u64>>,
    handles: u64,
    /// A kernel that failed spoils the context.
    failed: bool,
    /// Bytes that the card has.
    pub size: usize,
}

impl State {
    pub fn new() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|value| value.parse().ok());
        let dry = std::env::var_os("STAND_IN_DRIVER_DRY").is_some();
        Self {
            card: Card::new(),
            memory: Memory::new(dry),
            report: Report::default(),
            waiting: VecDeque::new(),
            capture: None,
            recordings: HashMap::new(),
            events: HashMap::new(),
            handles: 0x1000,
            failed: false,
            size: number("STAND_IN_DRIVER_MEMORY").unwrap_or(80 << 30),
        }
    }

    /// A number that nothing else is known by.
    pub fn handle(&mut self) -> u64 {
        self.handles += 0x10;
        self.handles
    }

    /// Says what was wrong, since a status does not.
    #[allow(clippy::print_stderr, reason = "a driver has no other way to be specific")]
    pub fn refuse<T>(&self, status: Status, why: &str) -> Result<T> {
        eprintln!("stand-in driver: {why} (status {})", status.0);
        Err(status)
    }

    /// Something that no thread may do while it records.
    pub fn check_no_capture(&mut self, what: &str) -> Result {
        match &mut self.capture {
            Some(capture) if capture.thread == std::thread::current().id() => {
                capture.invalid = true;
                self.refuse(Status::CAPTURE_UNSUPPORTED, &format!("{what} while a stream is recorded"))
            }
            _ => Ok(()),
        }
    }

    /// Something that is about all streams, which no thread may do while one of them is recorded.
    pub fn check_nobody_records(&mut self, what: &str) -> Result {
        match &mut self.capture {
            Some(capture) => {
                capture.invalid = true;
                self.refuse(Status::CAPTURE_UNSUPPORTED, &format!("{what} while a stream is recorded"))
            }
            None => Ok(()),
        }
    }

    /// Something that a stream may not do while it is recorded, whichever thread asks for it.
    pub fn check_not_recorded(&mut self, stream: u64, what: &str) -> Result {
        match &mut self.capture {
            Some(capture) if capture.stream == stream => {
                capture.invalid = true;
                self.refuse(Status::CAPTURE_UNSUPPORTED, &format!("{what} on a stream that is recorded"))
            }
            _ => Ok(()),
        }
    }

    /// Work for a stream.
    pub fn enqueue(&mut self, stream: u64, work: Work) -> Result {
        if self.failed {
            return Err(Status::LAUNCH_FAILED);
        }
        if let Some(capture) = self.capture.as_mut().filter(|capture| capture.stream == stream) {
            if capture.thread != std::thread::current().id() {
                capture.invalid = true;
                return self.refuse(
                    Status::CAPTURE_WRONG_THREAD,
                    "another thread's work on a stream that is recorded",
                );
            }
            capture.works.push(work);
            return Ok(());
        }
        if stream == 0 && self.capture.is_some() {
            return self
                .refuse(Status::CAPTURE_IMPLICIT, "work on the default stream while another is recorded");
        }
        self.report.noted(&work, &self.memory);
        self.waiting.push_back(Rc::new([work]));
        if self.waiting.len() > MOST_WAITING { self.finish() } else { Ok(()) }
    }

    /// Does what waits.
    pub fn finish(&mut self) -> Result {
        while let Some(works) = self.waiting.pop_front() {
            for work in works.iter() {
                if let Err(why) = work.run(&mut self.memory) {
                    self.failed = true;
                    self.waiting.clear();
                    return self.refuse(Status::LAUNCH_FAILED, &why);
                }
            }
        }
        if self.failed { Err(Status::LAUNCH_FAILED) } else { Ok(()) }
    }

    /// Memory for a stream, or for its recording.
    pub fn allocate(&mut self, stream: Option<u64>, bytes: usize) -> Result<u64> {
        if bytes == 0 {
            return self.refuse(Status::INVALID_VALUE, "an allocation of no bytes");
        }
        if self.report.bytes() + bytes > self.size {
            return Err(Status::OUT_OF_MEMORY);
        }
        let recorded = self.capture.as_ref().filter(|capture| Some(capture.stream) == stream);
        let owner = recorded.map_or(Owner::Pool, |capture| Owner::Recording(capture.number));
        let address = self.memory.allocate(bytes, owner).ok_or(Status::OUT_OF_MEMORY)?;
        match stream {
            Some(stream) if owner != Owner::Pool => self.enqueue(stream, Work::Allocate(address))?,
            _ => self.report.allocated(bytes),
        }
        Ok(address)
    }

    /// Frees memory once a stream has done what it was given before.
    pub fn free(&mut self, stream: u64, address: u64) -> Result {
        let owner = self.memory.owner(address);
        let capture = self.capture.as_mut().filter(|capture| capture.stream == stream);
        let expected = capture.as_ref().map_or(Owner::Pool, |capture| Owner::Recording(capture.number));
        if owner != Some(expected) {
            if let Some(capture) = capture {
                capture.invalid = true;
            }
            return self
                .refuse(Status::INVALID_VALUE, &format!("{owner:?}'s memory is freed by {expected:?}"));
        }
        self.enqueue(stream, Work::Free(address))
    }

    pub fn begin_capture(&mut self, stream: u64) -> Result {
        if stream == 0 || self.capture.is_some() {
            return self.refuse(
                Status::CAPTURE_UNSUPPORTED,
                "one stream, not the default one, is recorded at a time",
            );
        }
        let number = self.handle();
        let thread = std::thread::current().id();
        self.capture = Some(Capture { stream, number, thread, works: Vec::new(), invalid: false });
        Ok(())
    }

    /// A recording.
    pub fn end_capture(&mut self, stream: u64) -> Result<u64> {
        let Some(capture) = self.capture.take_if(|capture| capture.stream == stream) else {
            return self.refuse(Status::CAPTURE_UNMATCHED, "no recording to end");
        };
        if capture.invalid {
            self.memory.forget(capture.number);
            return self.refuse(Status::CAPTURE_INVALIDATED, "the recording was spoilt");
        }
        let [most, kept] = self.report.recorded(&capture.works, &self.memory);
        if kept > 0 {
            self.memory.forget(capture.number);
            return self
                .refuse(Status::INVALID_VALUE, &format!("a recording keeps {kept} bytes that it allocated"));
        }
        self.recordings.insert(capture.number, (capture.works.into(), most));
        Ok(capture.number)
    }

    /// `CUstreamCaptureStatus`: 0 unless it is recorded, 1 while it is, 2 if that was spoilt.
    pub fn capture_status(&self, stream: u64) -> u32 {
        let capture = self.capture.as_ref().filter(|capture| capture.stream == stream);
        capture.map_or(0, |capture| 1 + u32::from(capture.invalid))
    }

    /// What a stream that is recorded was given last, if anything.
    pub fn last_recorded(&self, stream: u64) -> Option<Option<&Work>> {
        let capture = self.capture.as_ref().filter(|capture| capture.stream == stream)?;
        Some(capture.works.last())
    }

    /// A launch whose blocks come before the one before has ended: they must wait on the card, and have a kernel to wait for, which
    /// a recording alone tells whoever launches.
    pub fn check_may_begin_early(&self, stream: u64, function: &Function) -> Result {
        let why = match self.last_recorded(stream) {
            _ if function.candles => "does not wait for its turn",
            None => "is not recorded",
            Some(Some(Work::Launch(_))) => return Ok(()),
            Some(_) => "follows no kernel",
        };
        self.refuse(Status::INVALID_VALUE, &format!("{} may begin early, and {why}", function.name))
    }

    /// Does a recording's work once more.
    pub fn replay(&mut self, recording: u64) -> Result {
        let Some((works, bytes)) = self.recordings.get(&recording).cloned() else {
            return self.refuse(Status::INVALID_HANDLE, "no such recording");
        };
        if self.failed {
            return Err(Status::LAUNCH_FAILED);
        }
        self.report.recording_replayed(&works, bytes);
        self.waiting.push_back(works);
        Ok(())
    }

    /// A recording is replayed no more.
    pub fn destroy_recording(&mut self, recording: u64) -> Result {
        self.finish()?;
        self.recordings.remove(&recording);
        self.memory.forget(recording);
        Ok(())
    }

    pub fn new_event(&mut self) -> u64 {
        let event = self.handle();
        self.events.insert(event, None);
        event
    }

    pub fn destroy_event(&mut self, event: u64) -> Result {
        self.events.remove(&event).map(drop).ok_or(Status::INVALID_HANDLE)
    }

    pub fn record_event(&mut self, event: u64, stream: u64) -> Result {
        let recording = self.capture.as_ref().filter(|capture| capture.stream == stream).map(|c| c.number);
        *self.events.get_mut(&event).ok_or(Status::INVALID_HANDLE)? = recording;
        Ok(())
    }

    /// Work is done in the order in which it was given, so nothing is waited for; but a recording waits for itself alone.
    pub fn wait_for_event(&mut self, stream: u64, event: u64) -> Result {
        let of = *self.events.get(&event).ok_or(Status::INVALID_HANDLE)?;
        let recorded = self.capture.as_ref().filter(|capture| capture.stream == stream).map(|c| c.number);
        if of == recorded {
            return Ok(());
        }
        if let Some(capture) = &mut self.capture {
            capture.invalid = true;
        }
        self.refuse(
            Status::CAPTURE_ISOLATION,
            "an event from outside of a recording is waited for in it, or the other way",
        )
    }
}

// The pointers to works stay behind the lock that guards the state.
#[allow(unsafe_code)]
// SAFETY: every `Rc` is reached through the state alone, by one thread at a time.
unsafe impl Send for State {}
