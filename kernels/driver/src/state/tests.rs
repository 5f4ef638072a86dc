use super::*;
use crate::work::{Function, Launch};

const STREAM: u64 = 7;

fn copy(to: u64, from: u64) -> Work {
    Work::Copy { to, from, bytes: 4 }
}

fn allocate(state: &mut State) -> u64 {
    state.allocate(Some(STREAM), 4).unwrap()
}

fn read(address: u64) -> u32 {
    // SAFETY: of memory that a test allocated.
    unsafe { *(address as *const u32) }
}

#[test]
fn work_waits_and_unwritten_memory_is_nan() {
    let mut state = State::new();
    let (a, b) = (allocate(&mut state), allocate(&mut state));
    assert!(f32::from_bits(read(a)).is_nan());
    state.enqueue(STREAM, Work::Fill { to: a, byte: 0, bytes: 4 }).unwrap();
    state.enqueue(STREAM, copy(b, a)).unwrap();
    assert!(f32::from_bits(read(b)).is_nan());
    state.finish().unwrap();
    assert_eq!(read(b), 0);
}

#[test]
fn reading_waits_too() {
    let mut state = State::new();
    let a = allocate(&mut state);
    let mut here = 7u32;
    let to = (&raw mut here).addr();
    state.enqueue(STREAM, Work::Fill { to: a, byte: 0, bytes: 4 }).unwrap();
    state.enqueue(STREAM, Work::Read { to, from: a, bytes: 4 }).unwrap();
    assert_eq!(here, 7);
    state.finish().unwrap();
    assert_eq!(here, 0);
}

#[test]
fn what_was_freed_is_not_used() {
    let mut state = State::new();
    let (a, b) = (allocate(&mut state), allocate(&mut state));
    state.free(STREAM, a).unwrap();
    state.enqueue(STREAM, copy(b, a)).unwrap();
    assert_eq!(state.finish(), Err(Status::LAUNCH_FAILED));
    assert_eq!(state.enqueue(STREAM, copy(b, b)), Err(Status::LAUNCH_FAILED), "the context is spoilt");
}

#[test]
fn nobody_writes_beside_memory() {
    let mut state = State::new();
    let a = allocate(&mut state);
    state.enqueue(STREAM, Work::Fill { to: a, byte: 0, bytes: 5 }).unwrap();
    assert_eq!(state.finish(), Err(Status::LAUNCH_FAILED));

    let mut state = State::new();
    let a = allocate(&mut state);
    // SAFETY: what follows is the guard.
    unsafe { *(a as *mut u8).add(4) = 0 };
    state.free(STREAM, a).unwrap();
    assert_eq!(state.finish(), Err(Status::LAUNCH_FAILED));
}

#[test]
fn a_recording_is_done_when_it_is_replayed() {
    let mut state = State::new();
    let (from, to) = (allocate(&mut state), allocate(&mut state));
    state.begin_capture(STREAM).unwrap();
    let between = allocate(&mut state);
    state.enqueue(STREAM, copy(between, from)).unwrap();
    state.enqueue(STREAM, copy(to, between)).unwrap();
    state.free(STREAM, between).unwrap();
    let recording = state.end_capture(STREAM).unwrap();
    for byte in [1, 2] {
        state.enqueue(STREAM, Work::Fill { to: from, byte, bytes: 4 }).unwrap();
        state.replay(recording).unwrap();
        state.finish().unwrap();
        assert_eq!(read(to), u32::from_ne_bytes([byte; 4]));
        assert!(f32::from_bits(read(between)).is_nan() || read(between) == read(to));
    }
    state.enqueue(STREAM, copy(to, between)).unwrap();
    assert_eq!(state.finish(), Err(Status::LAUNCH_FAILED), "a recording's memory is its own");
}

/// What spoils a recording.
#[test]
fn a_recording_takes_what_can_be_replayed() {
    let spoilt = |spoil: fn(&mut State, u64) -> Result, status| {
        let mut state = State::new();
        let before = allocate(&mut state);
        state.begin_capture(STREAM).unwrap();
        assert_eq!(spoil(&mut state, before), Err(status));
        assert_eq!(state.end_capture(STREAM), Err(Status::CAPTURE_INVALIDATED));
    };
    spoilt(|state, before| state.free(STREAM, before), Status::INVALID_VALUE);
    spoilt(|state, _| state.check_no_capture("waiting"), Status::CAPTURE_UNSUPPORTED);
    spoilt(|state, _| state.check_nobody_records("waiting for the card"), Status::CAPTURE_UNSUPPORTED);
    spoilt(|state, _| state.check_not_recorded(STREAM, "reading"), Status::CAPTURE_UNSUPPORTED);
    spoilt(
        |state, before| {
            let work = copy(before, before);
            std::thread::scope(|scope| scope.spawn(|| state.enqueue(STREAM, work)).join().unwrap())
        },
        Status::CAPTURE_WRONG_THREAD,
    );

    let mut state = State::new();
    let event = state.new_event();
    state.begin_capture(STREAM).unwrap();
    assert_eq!(state.wait_for_event(STREAM, event), Err(Status::CAPTURE_ISOLATION));

    let mut state = State::new();
    state.begin_capture(STREAM).unwrap();
    allocate(&mut state);
    assert_eq!(state.end_capture(STREAM), Err(Status::INVALID_VALUE), "memory that stays allocated");
}

#[test]
fn a_card_has_so_much_memory() {
    let mut state = State { size: 100, ..State::new() };
    let a = state.allocate(Some(STREAM), 60).unwrap();
    assert_eq!(state.allocate(Some(STREAM), 60), Err(Status::OUT_OF_MEMORY));
    state.free(STREAM, a).unwrap();
    assert!(state.allocate(Some(STREAM), 60).is_ok());
}

/// x · σ(x) of a number.
fn silu([to, from]: [u64; 2]) -> Work {
    let function = Box::leak(Box::new(Function::named("silu_f32", false).unwrap()));
    let (grid, block, arguments) = ([1; 3], [32, 1, 1], vec![to, from, 1]);
    Work::Launch(Launch { function, grid, block, shared_bytes: 0, cluster: 1, early: false, arguments })
}

#[test]
fn kernels_run_on_the_cpu() {
    let mut state = State::new();
    let (to, from) = (allocate(&mut state), allocate(&mut state));
    state.enqueue(STREAM, Work::Upload { to: from, data: 1.5f32.to_ne_bytes().to_vec() }).unwrap();
    state.enqueue(STREAM, silu([to, from])).unwrap();
    state.finish().unwrap();
    assert!((f32::from_bits(read(to)) - 1.5 / (1.0 + (-1.5f32).exp())).abs() < 1e-6);
}

#[test]
fn kernels_that_wait_may_begin_early_behind_kernels() {
    let [own, candles] = [("silu_f32", false), ("cast_f32_f16", true)]
        .map(|(name, candles)| Function::named(name, candles).unwrap());
    let mut state = State::new();
    let (to, from) = (allocate(&mut state), allocate(&mut state));
    assert_eq!(state.check_may_begin_early(STREAM, &own), Err(Status::INVALID_VALUE), "not recorded");
    assert_eq!(state.check_may_begin_early(STREAM, &candles), Err(Status::INVALID_VALUE));
    state.begin_capture(STREAM).unwrap();
    assert_eq!(state.check_may_begin_early(STREAM, &own), Err(Status::INVALID_VALUE), "nothing comes before");
    state.enqueue(STREAM, silu([to, from])).unwrap();
    assert_eq!(state.check_may_begin_early(STREAM, &own), Ok(()));
    assert_eq!(state.check_may_begin_early(STREAM, &candles), Err(Status::INVALID_VALUE));
    state.enqueue(STREAM, copy(to, from)).unwrap();
    assert_eq!(state.check_may_begin_early(STREAM, &own), Err(Status::INVALID_VALUE));
}
