//! How the guest resets or switches off the machine: the i8042's reset line, and ACPI's registers
//! (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7). Nothing else of an i8042 is there.

use crate::{
    arch::x86_64::acpi::{RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_TYPE_S5},
    bus::{BusDevice, Effect},
};

/// The i8042 command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;
/// SLEEP_CONTROL_REG: SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The command and status port of an i8042.
#[derive(Debug, Default)]
pub struct I8042;

impl BusDevice for I8042 {
    /// An empty input buffer, so that a guest which waits to give its command need not wait.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        if data == [PULSE_RESET] {
            Effect::Reset
        } else {
            Effect::None
        }
    }
}

/// Sleep control, sleep status and reset.
#[derive(Debug, Default)]
pub struct Power;

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let &[value] = data else {
            return Effect::None;
        };
        if offset == u64::from(RESET_OFFSET) && value == RESET_VALUE {
            return Effect::Reset;
        }
        let to_s5 = value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5;
        if offset == u64::from(SLEEP_CONTROL_OFFSET) && to_s5 {
            return Effect::PowerOff;
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agreed_values_have_an_effect() {
        let s5 = SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE;
        for offset in 0..3 {
            for value in 0..=255 {
                let expected = match (offset, value) {
                    (0, value) if value & 0x3c == s5 => Effect::PowerOff,
                    (2, RESET_VALUE) => Effect::Reset,
                    _ => Effect::None,
                };
                assert_eq!(Power.write(offset, &[value]), expected, "{offset} {value}");
            }
        }
        assert_eq!(I8042.write(0, &[PULSE_RESET]), Effect::Reset);
        assert_eq!(I8042.write(0, &[0xd1]), Effect::None);
        assert_eq!(I8042.write(0, &[PULSE_RESET, 0]), Effect::None);
    }
}
