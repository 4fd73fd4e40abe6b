//! The shipped rings beside the bare one, in paired, alternating measurements of one run; and single measurements for others to pair.
//!
//!     ring-peers compare [PAIRS [RING [THREADS]]]    one JSON line a row: median, least, most of each
//!     ring-peers bursts THREADS FORMAT SIZE BURST PAYLOAD TOTAL    nanoseconds a buffer
//!     ring-peers line    nanoseconds of a cache line's round trip between the two cores

mod bare;
mod bursts;
mod pair;
mod shipped;

use pair::{Device, Driver, cache_line_round_trip, one_thread, two_threads};
use virtqueue::Format;

const SIZE: usize = 256;
const BURST: usize = 64;
const TOTAL: usize = 1 << 21;

#[derive(Clone, Copy, PartialEq)]
enum Threads {
    One,
    Two,
}

impl Threads {
    fn name(self) -> &'static str {
        match self {
            Threads::One => "one",
            Threads::Two => "two",
        }
    }

    fn measure<A: Driver, B: Device + Send>(self, (mut driver, mut device): (A, B)) -> f64 {
        match self {
            Threads::One => one_thread(&mut driver, &mut device, TOTAL, BURST),
            Threads::Two => two_threads(&mut driver, &mut device, TOTAL, BURST),
        }
    }
}

/// Sorted: "[median,least,most]".
fn summary(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    format!("[{:.2},{:.2},{:.2}]", values[values.len() / 2], values[0], values[values.len() - 1])
}

fn compare<A: Driver, B: Device + Send, C: Driver, D: Device + Send>(
    args: &[String],
    name: &str,
    bare: impl Fn() -> (A, B),
    shipped: impl Fn() -> (C, D),
) {
    let pairs: usize = args.first().map_or(15, |n| n.parse().expect("PAIRS is a number"));
    let asked = |place: usize, is: &str| args.get(place).is_none_or(|only| only == is);
    for threads in [Threads::One, Threads::Two] {
        if !asked(1, name) || !asked(2, threads.name()) {
            continue;
        }
        let (mut bare_ns, mut shipped_ns, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for turn in 0..pairs {
            // Alternate who goes first.
            let (b, s) = if turn % 2 == 0 {
                let b = threads.measure(bare());
                (b, threads.measure(shipped()))
            } else {
                let s = threads.measure(shipped());
                (threads.measure(bare()), s)
            };
            bare_ns.push(b);
            shipped_ns.push(s);
            ratios.push(s / b);
        }
        println!(
            "{{\"ring\":\"{name}\",\"threads\":\"{}\",\"burst\":{BURST},\"size\":{SIZE},\"pairs\":{pairs},\
             \"bare_ns\":{},\"shipped_ns\":{},\"ratio\":{}}}",
            threads.name(),
            summary(bare_ns),
            summary(shipped_ns),
            summary(ratios)
        );
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| -> usize { args[place].parse().expect("a number") };
    match args.first().map(String::as_str) {
        Some("compare") => {
            let rest = &args[1..];
            compare(rest, "split", || bare::split::<false>(SIZE), || shipped::make(Format::Split, SIZE, false, BURST));
            compare(rest, "split in-order", || bare::split::<true>(SIZE), || shipped::make(Format::Split, SIZE, true, BURST));
            compare(rest, "packed", || bare::packed::<false>(SIZE), || shipped::make(Format::Packed, SIZE, false, BURST));
            compare(rest, "packed in-order", || bare::packed::<true>(SIZE), || shipped::make(Format::Packed, SIZE, true, BURST));
        }
        Some("bursts") if args.len() == 7 => {
            let threads = if args[1] == "one" { Threads::One } else { Threads::Two };
            let format = if args[2] == "packed" { Format::Packed } else { Format::Split };
            let (size, burst, payload, total) = (number(3) as u16, number(4), number(5), number(6));
            println!("{:.3}", bursts::measure(bursts::Run { threads, format, size, burst, payload, total }));
        }
        Some("line") => println!("{:.1}", cache_line_round_trip()),
        _ => {
            eprintln!("ring-peers compare [PAIRS [RING [THREADS]]] | bursts THREADS FORMAT SIZE BURST PAYLOAD TOTAL | line");
            std::process::exit(2);
        }
    }
}
