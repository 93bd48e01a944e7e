//! `checks`: what a Linux guest must do right, tried from within (docs/images.md).

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    guest_checks::run(&words)
}
