# From the PVH entry point to ring 3 in as few ring 0 instructions as possible: where KVM has no hardware virtualization it
# emulates ring 0 one instruction at a time. Page tables and descriptors are therefore made by the assembler.
#
# PVH (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, paging off, flat segments, EBX = physical address of hvm_start_info.

.set KERNEL_CODE, 0x08
.set USER_DATA,   0x18 | 3
.set USER_CODE,   0x20 | 3
.set TASK,        0x28

.set CR4_PAE_OSFXSR_OSXMMEXCPT, 0x620
.set CR0_PG_ET_MP_PE, 0x80000013
# Interrupts off, I/O privilege for ring 3. The task state's bitmap gives it, too: KVM that emulates ring 0 heeds the bitmap only, and
# QEMU that emulates AMD-V heeds the bitmap until a task register is restored (as "busy", which a CPU takes), the privilege always.
.set FLAGS_IOPL_3, 0x3002
.set MSR_EFER, 0xc0000080
.set EFER_LME, 0x100
.set MSR_KVM_SYSTEM_TIME_NEW, 0x4b564d01
.set CPUID_HYPERVISOR, 0x40000000
.set CPUID_TSC_FREQUENCY, 0x40000010
.set SIGNATURE_KVMK, 0x4b4d564b            # "KVMK", the start of KVM's signature, in EBX

.set PRESENT_WRITABLE_USER, 0x7
.set LARGE_PAGE, 0x80
.set BOOT_ADDRESS, 0x100000                # where link.ld puts this section

.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18                             # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_entry

.section .boot, "awx", @progbits
boot_start:

# Identity map of the first GiB in 2 MiB pages, open to ring 3. Ring 3 itself adds what lies above.
.balign 4096
.global page_map_level_4
page_map_level_4:
    .quad directory_pointers + PRESENT_WRITABLE_USER
    .fill 511, 8, 0
.global directory_pointers
directory_pointers:
    .quad first_directory + PRESENT_WRITABLE_USER
    .fill 511, 8, 0
first_directory:
    .set frame, 0
    .rept 512
    .quad frame + LARGE_PAGE + PRESENT_WRITABLE_USER
    .set frame, frame + 0x200000
    .endr

.balign 8
descriptors:
    .quad 0
    .quad 0x00af9b000000ffff               # ring 0 code, 64-bit
    .quad 0x00cf93000000ffff               # ring 0 data
    .quad 0x00cff3000000ffff               # ring 3 data
    .quad 0x00affb000000ffff               # ring 3 code, 64-bit
    .set task_base, BOOT_ADDRESS + (task - boot_start)
    .set task_limit, task_end - task - 1
    .quad 0x0000890000000000 + task_limit + ((task_base & 0xffffff) << 16) + ((task_base >> 24) << 56)
    .quad 0
descriptors_end:
descriptors_pointer:
    .word descriptors_end - descriptors - 1
    .quad descriptors
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

# Task state: the stack for exceptions, and an I/O permission bitmap that opens ports 0 to 0x7ff to ring 3.
.balign 8
task:
    .long 0
    .quad ring0_stack_end                  # RSP0
    .fill 90, 1, 0
    .word io_bitmap - task
io_bitmap:
    .fill 256, 1, 0
    .byte 0xff
task_end:

# What ring 0 found out for ring 3: see the struct of the same shape in machine.rs.
.balign 4
.global boot_facts
boot_facts:
tsc_khz:    .long 0                        # CPUID 0x40000010, or 0
kvm_clock:  .long 0                        # 1: the pvclock structure below is filled by KVM

.code32
.global pvh_entry
pvh_entry:
    movl $page_map_level_4, %eax
    movl %eax, %cr3
    movl $CR4_PAE_OSFXSR_OSXMMEXCPT, %eax
    movl %eax, %cr4
    movl $MSR_EFER, %ecx
    xorl %edx, %edx
    movl $EFER_LME, %eax
    wrmsr
    movl $CR0_PG_ET_MP_PE, %eax
    movl %eax, %cr0
    lgdt descriptors_pointer
    ljmp $KERNEL_CODE, $long_mode

.code64
long_mode:
    movl %ebx, %r12d
    movl $ring0_stack_end, %esp
    movl $TASK, %eax
    ltr %ax
    lidt idt_pointer
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es

    # The TSC frequency: only ring 0 is sure to see the VMM's CPUID.
    movl $CPUID_HYPERVISOR, %eax
    cpuid
    movl %ebx, %r13d
    cmpl $CPUID_TSC_FREQUENCY, %eax
    jb 1f
    movl $CPUID_TSC_FREQUENCY, %eax
    cpuid
    movl %eax, tsc_khz

    # KVM's clock, whose time is looked at beside the TSC's.
1:  cmpl $SIGNATURE_KVMK, %r13d
    jne 2f
    movl $MSR_KVM_SYSTEM_TIME_NEW, %ecx
    xorl %edx, %edx
    movl $(pvclock + 1), %eax              # bit 0: enable
    wrmsr
    movl $1, kvm_clock

2:  movl %r12d, %edi                       # hvm_start_info, the argument
    movl $probe_main, %edx
    jmp enter_ring3

# Exceptions: none is expected. Each goes back to ring 3, to a function that reports it and powers off.
.global exception_stubs
.balign 16
exception_stubs:
.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    .balign 16
    .if (\vector != 8) && (\vector != 10) && (\vector != 11) && (\vector != 12) && (\vector != 13) && (\vector != 14) && (\vector != 17) && (\vector != 21)
    pushq $0                               # the CPU pushes an error code only for the others
    .endif
    pushq $\vector
    jmp exception_common
.endr

exception_common:
    popq %rdi                              # vector
    popq %rsi                              # error code
    movq (%rsp), %r8                       # RIP
    movq %cr2, %rcx
    movl $probe_exception, %edx

# Leaves ring 0 for the function in RDX, with a fresh stack.
enter_ring3:
    movl $ring0_stack_end, %esp
    pushq $USER_DATA
    movl $(user_stack_end - 8), %eax       # as if called: RSP is 8 below a multiple of 16
    pushq %rax
    pushq $FLAGS_IOPL_3
    pushq $USER_CODE
    pushq %rdx
    iretq

.section .bss.boot, "aw", @nobits
.balign 4096
.global idt
idt:
    .skip 32 * 16
.balign 64
.global pvclock
pvclock:
    .skip 64
.balign 16
    .skip 1024
ring0_stack_end:
    .skip 65536
user_stack_end:
