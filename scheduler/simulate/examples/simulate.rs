//! `cargo run --release -p shoal-simulate --example simulate -- FILE…`: the tables of the given files.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in std::env::args().skip(1) {
        match shoal_simulate::load(file.as_ref()) {
            Ok(scenario) => println!("{}", shoal_simulate::compare(&scenario, 2).table()),
            Err(error) => {
                eprintln!("{file}: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}
